"""SVIP: the draft model's entropy decides when to stop."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.rules.base import StopRule
from spec_envs.controls.base import Control
from spec_envs.controls.observation.recorded import ENTROPY_UNIT


class SvipAgent(StopRule):
    """Stops where the square root of the draft distribution's entropy, which bounds the acceptance rate from below, is
    above a threshold (Zhang et al. 2024, arXiv 2411.18462).

    Args:
        threshold: largest √H at which drafting continues, H in nats.
        copy_threshold: as of ``StopRule``.
    """

    looks_at = ("drafted", "entropy", "path", "free")

    def __init__(self, control: Control, threshold: float = 0.6, copy_threshold: float = 0.1):
        super().__init__(control, copy_threshold)
        self.threshold = threshold

    def stops(self, observation: np.ndarray) -> bool:
        return bool(np.sqrt(ENTROPY_UNIT * self.read(observation, "entropy")) > self.threshold)

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {"threshold": trial.suggest_float("threshold", 0.1, 2.5), **StopRule.space(trial)}
