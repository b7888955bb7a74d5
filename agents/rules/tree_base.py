"""Base classes of the published rules for trees."""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.base import Rule
from spec_envs.agents.settings import AgentSettings, Count
from spec_envs.controls.base import Control


class TreeRule(Rule):
    """A published rule for a tree of drafted nodes."""

    def numbers(self, observation: np.ndarray, name: str) -> np.ndarray:
        """Return all numbers of an entry of the observation."""
        return observation[self.control.slices[name]].astype(np.float64)

    def depth(self, observation: np.ndarray) -> int:
        """Return the expansions so far."""
        return round(self.read(observation, "expansions") * self.control.max_depth)


class GrowthRule(TreeRule):
    """A rule that grows a tree until it expects too little of the next level. How many nodes are verified then is
    fixed.

    Raises:
        ValueError: a budget that the control does not offer.
    """

    class Settings(AgentSettings):
        budget: Count = Field(7, description="nodes verified, where the control offers several budgets (SpecTree-v0)")

    settings: Settings

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        budget = control.budgets[0] if len(control.budgets) == 1 else self.settings.budget
        if budget not in control.budgets:
            raise ValueError(f"budget is {budget}; expected one of {', '.join(map(str, control.budgets))}")
        plans = control.plans()
        self.expand, self.verify = plans.drafts, int(plans.ends[control.budgets.index(budget)])

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        deepest = self.depth(observation) == self.control.max_depth
        return self.verify if deepest or self.stops(observation) else self.expand, state

    @abstractmethod
    def stops(self, observation: np.ndarray) -> bool:
        """Return whether to verify what is drafted."""

    def space(self, trial: Any) -> dict[str, Any]:
        """Return hyper-parameters to try, suggested by an Optuna trial: a budget, where it is the rule's to choose."""
        if len(self.control.budgets) > 1:
            return {"budget": trial.suggest_categorical("budget", self.control.budgets)}
        return {}


class PricedRule(TreeRule):
    """A rule that weighs tokens against seconds, which it reads from ``control.costs`` when it first decides."""

    needs_costs = True

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.budgets = np.array(control.budgets)

    @functools.cached_property
    def seconds(self) -> np.ndarray:
        """The seconds of a cycle by depth and budget ``[max_depth + 1, budgets]``: the root's forward, one over the
        frontier for each expansion, and the verification of the budget, as far as the tree has so many nodes, with the
        root.

        Raises:
            ValueError: the control has no cost table.
        """
        table, width = self.control.costs, self.control.width
        if table is None:
            raise ValueError(
                f"{type(self).__name__} needs the seconds of forwards: set the control's costs to a CostTable, "
                "or load a run whose clock is one or was calibrated"
            )
        return np.array(
            [
                [
                    table.seconds("draft", 1)
                    + depth * table.seconds("draft", width)
                    + table.seconds("verify", 1 + min(budget, width + depth * width**2))
                    for budget in self.budgets.tolist()
                ]
                for depth in range(self.control.max_depth + 1)
            ]
        )
