"""Expected tokens per second: the tree that the drafter's probabilities and the cost curve make the best."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.tree_base import PricedRule
from spec_envs.agents.settings import AgentSettings, Amount
from spec_envs.controls.base import Control


class ExpectedGainAgent(PricedRule):
    """Verifies the budget with the most expected tokens per second of the cycle: the one whose
    (1 + A(budget)) / (T_draft(depth) + T_verify(budget + 1)) is largest. A, the expected accepted tokens, is the summed
    path probability of the budget's nodes (the expected length of OPT-Tree, arXiv 2406.17276, over measured seconds);
    T_draft and T_verify are read from the cost table.

    In ``SpecTree-v0`` it expands while the highest of these ratios is expected to be higher with another level. With
    S(d) the ``survival`` of level d and S(−1) = 1, the level is taken to add S(d) · min(1, S(d) / S(d−1)) accepted
    tokens to every budget that has room for a path to it, and to cost one forward over the frontier.

    It trusts the drafter's probabilities; where the drafter is overconfident, a ``scale`` below 1 corrects them.
    """

    class Settings(AgentSettings):
        scale: Amount = Field(
            1.0, description="factor of the drafter's probabilities; below 1 for a drafter that is overconfident"
        )

    settings: Settings
    problems = ("budget", "tree")
    looks_at = ("gains", "survival", "expansions")

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.plans = control.plans()

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        depth, deepest = self.depth(observation), self.control.max_depth
        accepted = self.numbers(observation, "gains").cumsum() * (deepest + 1)
        now = self.rates(accepted, depth)
        best = int(np.argmax(now))
        room = self.budgets >= depth + 2  # a path to the next level has that many nodes
        if (
            self.plans.stepwise
            and depth < deepest
            and self.rates(accepted + room * self.next_level(observation), depth + 1).max() > now[best]
        ):
            return self.plans.drafts, state
        return int(self.plans.ends[best]), state

    def rates(self, accepted: np.ndarray, depth: int) -> np.ndarray:
        """Return the expected tokens per second of each budget, ``[budgets]``."""
        rates: np.ndarray = (1 + self.settings.scale * accepted) / self.seconds[depth]
        return rates

    def next_level(self, observation: np.ndarray) -> float:
        """Return how many accepted tokens another level is expected to add, at most."""
        survival, depth = self.numbers(observation, "survival"), self.depth(observation)
        before = survival[depth - 1] if depth else 1.0
        return float(survival[depth] * np.clip(survival[depth] / max(before, 1e-9), 0, 1))

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {"scale": trial.suggest_float("scale", 0.3, 2.0)}
