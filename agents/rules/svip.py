"""SVIP: the draft model's entropy decides when to stop."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.base import StopRule
from spec_envs.agents.settings import Amount
from spec_envs.controls.observation.recorded import ENTROPY_UNIT


class SvipAgent(StopRule):
    """Stops drafting where √H is above a threshold, H the entropy of the draft distribution in nats (Zhang et al. 2024,
    SVIP, arXiv 2411.18462). The paper derives a lower bound on the acceptance rate that falls with √H: where the
    drafter is undecided, its token is likely to be rejected.
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
