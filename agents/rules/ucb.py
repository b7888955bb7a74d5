"""A bandit over the draft length."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.rules.bandit import Bandit
from spec_envs.agents.rules.base import ChainRule
from spec_envs.controls.base import Control


class UcbAgent(ChainRule):
    """Applies discounted UCB to K: each arm is worth its tokens per unit of time, a chain of K costing as much as 1 +
    c·K plain steps, plus a bonus where it was tried little lately (Garivier and Moulines 2011, arXiv 0805.3415; bandits
    over draft lengths: Hou et al. 2025, BanditSpec, arXiv 2505.15141). It learns while it is deployed.

    Args:
        cost: the price c of a drafted token, in units of a plain step.
        exploration: weight of the bonus.
        discount: weight of an observation one decision earlier.
        arms: lengths to choose from, as far as the environment has them.
    """

    decision = "cycle"
    remembers = ("bandit",)
    looks_at = ("last_k", "last_acceptance")

    def __init__(
        self,
        control: Control,
        cost: float = 0.1,
        exploration: float = 0.05,
        discount: float = 0.999,
        arms: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8, 12, 16),
    ):
        super().__init__(control)
        self.arms = np.array([k for k in arms if k <= self.k_max])
        self.bandit = Bandit(1 + cost * self.arms, exploration, discount)

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        if not start:
            drafted = self.read(observation, "last_k") * self.k_max
            self.bandit.record(1 + self.read(observation, "last_acceptance") * drafted)
        return int(self.arms[self.bandit.choose(1 + self.arms)]), state

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "cost": trial.suggest_float("cost", 0.02, 0.5, log=True),
            "exploration": trial.suggest_float("exploration", 0.005, 0.5, log=True),
            "discount": trial.suggest_categorical("discount", [0.97, 0.99, 0.995, 0.999, 1.0]),
        }
