"""AdaEDL: an entropy bound on acceptance against a threshold that follows the acceptance rate."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.base import StopRule
from spec_envs.agents.settings import Amount, Share
from spec_envs.controls.base import Control
from spec_envs.controls.observation.recorded import ENTROPY_UNIT


class AdaedlAgent(StopRule):
    """Stops drafting where a lower bound on the chance of acceptance, 1 − √(γH), falls below a threshold λ that adapts
    (Agrawal et al. 2024, AdaEDL, arXiv 2410.18351). H is the entropy of the draft distribution in nats.

    After every cycle the acceptance rate r of its chain updates a moving average, r̄ ← m·r̄ + (1 − m)·r, with m the
    ``rate_memory``. Then λ ← l·λ + (1 − l)·(λ + ε·sign(target − r̄)), with l the ``threshold_memory`` and ε the
    ``step``: λ rises while less than ``target`` is accepted, and chains get shorter; it falls while more is.
    """

    class Settings(StopRule.Settings):
        scale: Amount = Field(0.2, description="factor γ of the entropy")
        threshold: Share = Field(0.4, description="first λ")
        target: Share = Field(0.9, description="target acceptance rate")
        step: Amount = Field(0.01, description="amount by which λ is moved")
        rate_memory: Share = Field(
            0.5, description="share of the old value in the moving average of the acceptance rate"
        )
        threshold_memory: Share = Field(0.9, description="share of the old value in the moving average of λ")

    settings: Settings
    remembers = ("rate", "threshold")
    looks_at = ("drafted", "entropy", "path", "free", "last_k", "last_acceptance")

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.rate, self.threshold = self.settings.target, self.settings.threshold

    def begin(self, observation: np.ndarray) -> None:
        if not self.read(observation, "last_k"):
            return
        own, accepted = self.settings, self.read(observation, "last_acceptance")
        self.rate = own.rate_memory * self.rate + (1 - own.rate_memory) * accepted
        moved = self.threshold + own.step * np.sign(own.target - self.rate)
        self.threshold = own.threshold_memory * self.threshold + (1 - own.threshold_memory) * moved

    def stops(self, observation: np.ndarray) -> bool:
        bound = 1 - np.sqrt(self.settings.scale * ENTROPY_UNIT * self.read(observation, "entropy"))
        return bool(bound < self.threshold)

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "threshold": trial.suggest_float("threshold", 0.0, 0.9),
            "target": trial.suggest_float("target", 0.3, 0.95),
            "step": trial.suggest_float("step", 0.001, 0.1, log=True),
            **StopRule.space(trial),
        }
