"""A bandit over the number of nodes verified."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.rules.bandit import Bandit, BanditSettings
from spec_envs.agents.rules.tree_base import PricedRule
from spec_envs.controls.base import Control


class UcbBudgetAgent(PricedRule):
    """Chooses the budget as a discounted bandit (Garivier and Moulines 2011, arXiv 0805.3415), as ``ucb`` chooses K: each
    budget is worth its tokens over the seconds of a cycle under the cost table. It learns while it is deployed.
    """

    Settings = BanditSettings
    settings: BanditSettings
    problems = ("budget",)
    remembers = ("bandit", "accepted")
    looks_at = ("recent", "expansions")

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.bandit = Bandit(np.ones(len(self.budgets)), self.settings.exploration, self.settings.discount)
        self.accepted: list[int] = []  # of this text's last cycles, at most four

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        if start:
            self.accepted = []
        else:
            self.bandit.record(1 + self._last_accepted(observation))
        depth = self.depth(observation)
        self.bandit.prices = self.seconds[depth]
        return self.bandit.choose(1 + np.minimum(self.budgets, depth + 1)), state

    def _last_accepted(self, observation: np.ndarray) -> int:
        """Return the accepted tokens of the last cycle: those of the last four cycles, less those already known."""
        cycles = min(4, len(self.accepted) + 1)
        known = self.accepted[-3:]
        total = self.read(observation, "recent") * (self.control.max_depth + 1) * cycles
        self.accepted = [*known, round(total) - sum(known)]
        return self.accepted[-1]

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return BanditSettings.space(trial)
