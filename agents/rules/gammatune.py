"""GammaTune: the draft length follows the accepted length."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.base import LengthRule
from spec_envs.agents.settings import Amount, Share
from spec_envs.controls.base import Control


class GammaTuneAgent(LengthRule):
    """Sets the next chain's length by a moving average of the accepted length, and adds some tokens of slack (after
    Gautam et al. 2025, GammaTune, arXiv 2504.00030; the constants are this project's, to be tuned).

    With A the accepted tokens of the last chain, the estimate is E ← m·E + (1 − m)·A, m being the ``memory``. A chain
    that was accepted whole shows only that more would have been, so there E grows by ``growth`` instead. The next chain
    has E + ``slack`` tokens.
    """

    class Settings(LengthRule.Settings):
        k: Amount = Field(4.0, description="first length")
        memory: Share = Field(0.7, description="share of the old estimate in the average")
        growth: Amount = Field(1.0, description="tokens that a whole chain adds to the estimate")
        slack: Amount = Field(1.0, description="tokens drafted beyond the estimate")

    settings: Settings
    remembers = ("k", "estimate")
    looks_at = ("last_k", "last_acceptance")

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.estimate = self.k - self.settings.slack

    def update(self, accepted: float, observation: np.ndarray) -> None:
        own, length = self.settings, accepted * self.read(observation, "last_k") * self.k_max
        if accepted == 1:
            self.estimate = min(max(self.estimate, length) + own.growth, self.k_max)
        else:
            self.estimate = own.memory * self.estimate + (1 - own.memory) * length
        self.k = max(1.0, self.estimate + own.slack)

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "memory": trial.suggest_float("memory", 0.3, 0.97),
            "growth": trial.suggest_float("growth", 0.0, 3.0),
            "slack": trial.suggest_float("slack", 0.0, 3.0),
        }
