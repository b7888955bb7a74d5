"""AdaEDL: an entropy bound on acceptance against a threshold that follows the acceptance rate."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.rules.base import StopRule
from spec_envs.controls.base import Control
from spec_envs.controls.observation.recorded import ENTROPY_UNIT


class AdaedlAgent(StopRule):
    """Stops where 1 − √(γH), H the entropy of the draft distribution in nats, is below λ. After every cycle λ moves
    towards a target acceptance rate: up where less is accepted, down where more is (Agrawal et al. 2024,
    arXiv 2410.18351).

    Args:
        scale: the factor γ of the entropy.
        threshold: the first λ.
        target: the target acceptance rate.
        step: amount by which λ is moved.
        rate_memory, threshold_memory: share of the old value in the moving averages of the acceptance rate and of λ.
        copy_threshold: as of ``StopRule``.
    """

    remembers = ("rate", "threshold")
    looks_at = ("drafted", "entropy", "path", "free", "last_k", "last_acceptance")

    def __init__(
        self,
        control: Control,
        scale: float = 0.2,
        threshold: float = 0.4,
        target: float = 0.9,
        step: float = 0.01,
        rate_memory: float = 0.5,
        threshold_memory: float = 0.9,
        copy_threshold: float = 0.1,
    ):
        super().__init__(control, copy_threshold)
        self.scale, self.threshold, self.target, self.step = scale, threshold, target, step
        self.rate_memory, self.threshold_memory = rate_memory, threshold_memory
        self.rate = target

    def begin(self, observation: np.ndarray) -> None:
        if not self.read(observation, "last_k"):
            return
        accepted = self.read(observation, "last_acceptance")
        self.rate = self.rate_memory * self.rate + (1 - self.rate_memory) * accepted
        moved = self.threshold + self.step * np.sign(self.target - self.rate)
        self.threshold = self.threshold_memory * self.threshold + (1 - self.threshold_memory) * moved

    def stops(self, observation: np.ndarray) -> bool:
        bound = 1 - np.sqrt(self.scale * ENTROPY_UNIT * self.read(observation, "entropy"))
        return bool(bound < self.threshold)

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "threshold": trial.suggest_float("threshold", 0.0, 0.9),
            "target": trial.suggest_float("target", 0.3, 0.95),
            "step": trial.suggest_float("step", 0.001, 0.1, log=True),
            **StopRule.space(trial),
        }
