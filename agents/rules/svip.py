"""SVIP: the draft model's entropy decides when to stop."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.base import StopRule
from spec_envs.agents.settings import Amount
from spec_envs.controls.observation.recorded import ENTROPY_UNIT


class SvipAgent(StopRule):
    """Stops where the square root of the draft distribution's entropy, which bounds the acceptance rate from below, is
    above a threshold (Zhang et al. 2024, arXiv 2411.18462).
    """

    class Settings(StopRule.Settings):
        threshold: Amount = Field(0.6, description="largest √H at which drafting continues, H in nats")

    settings: Settings
    looks_at = ("drafted", "entropy", "path", "free")

    def stops(self, observation: np.ndarray) -> bool:
        return bool(np.sqrt(ENTROPY_UNIT * self.read(observation, "entropy")) > self.settings.threshold)

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {"threshold": trial.suggest_float("threshold", 0.1, 2.5), **StopRule.space(trial)}
