"""A bandit over the draft length."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.bandit import Bandit, BanditSettings
from spec_envs.agents.rules.base import ChainRule
from spec_envs.agents.settings import Amount, Natural
from spec_envs.controls.base import Control


class UcbAgent(ChainRule):
    """Chooses the chain length K as a discounted bandit (Garivier and Moulines 2011, arXiv 0805.3415; bandits over draft
    lengths: Hou et al. 2025, BanditSpec, arXiv 2505.15141).

    Every length is an arm. Its worth is (X̄ + ξ·(1 + K)·√(ln Σn / n)) / (1 + c·K): X̄ is its mean of emitted tokens and n
    the number of its tries, both discounted by ``discount`` at every decision; ξ is ``exploration``; and a chain of K
    costs as much as 1 + c·K plain steps, c being ``cost``. The arm of the highest worth is drawn. It learns while it is
    deployed and needs no training, but it does not see the text.
    """

    class Settings(BanditSettings):
        cost: Amount = Field(0.1, description="price c of a drafted token, in units of a plain step")
        arms: tuple[Natural, ...] = Field(
            (0, 1, 2, 3, 4, 6, 8, 12, 16), description="lengths to choose from, as far as the environment has them"
        )

    settings: Settings
    decision = "cycle"
    remembers = ("bandit",)
    looks_at = ("last_k", "last_acceptance")

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        own = self.settings
        self.arms = np.array([k for k in own.arms if k <= self.k_max])
        if not len(self.arms):
            raise ValueError(f"arms is {list(own.arms)}; expected at least one length of at most {self.k_max} tokens")
        self.bandit = Bandit(1 + own.cost * self.arms, own.exploration, own.discount)

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        if not start:
            drafted = self.read(observation, "last_k") * self.k_max
            self.bandit.record(1 + self.read(observation, "last_acceptance") * drafted)
        return int(self.arms[self.bandit.choose(1 + self.arms)]), state

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "cost": trial.suggest_float("cost", 0.02, 0.5, log=True),
            **BanditSettings.space(trial),
        }
