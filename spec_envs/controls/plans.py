"""Every way in which a cycle can go on from a decision, as arrays: what agents that learn from full information weigh."""

from __future__ import annotations

import numpy as np

from spec_envs.controls.base import Control
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import EXPAND, VERIFY, DepthControl
from spec_envs.controls.k import DRAFT, KControl
from spec_envs.controls.tree import TreeControl
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.full_trees import level_slice

# Entries of an observation that are the same all through a cycle
UNCHANGED = (
    "recent",
    "match",
    "acceptance",
    "last_k",
    "last_acceptance",
    "position",
    "context",
    "kind",
    "task",
    "costs",
)


class Plans:
    """The plans of a cycle, each a size to draft to and a budget to verify.

    Args:
        control: of trees, or of chains.

    Attributes:
        sizes: ``[plans]``, expansions of a tree, or tokens of a chain.
        budgets: ``[plans]``, which of the control's budgets is verified (of a chain always the whole).
        nodes: ``[plans]``, drafted nodes that are then verified.
        levels: decisions that there can be in a cycle; at level i, i expansions are made or tokens drafted (a control that
            decides once has one level).
        first: level of the first decision; what comes before is always drafted.
        made: expansions in front of the first decision.
        deepest: the largest size that there can be.
        copies: whether some tokens may be drafted for nothing.
        own: how many of an observation's first entries tell of what this cycle has drafted; the others are the same all
            through it. 0 where a decision comes before drafting.

    Raises:
        ValueError: another control, or one that decides for several cycles at once.
    """

    def __init__(self, control: Control):
        self.control, self.copies = control, isinstance(control, KControl)
        if isinstance(control, KControl) and not control.adjustment_interval:
            stepwise = control.decision == "token"
            self.sizes, self.budgets = np.arange(control.k_max + 1), np.zeros(control.k_max + 1, np.int64)
            self.nodes = self.sizes
        elif isinstance(control, (DepthControl, BudgetControl, TreeControl)):
            offered = np.array([control.budget] if isinstance(control, DepthControl) else control.budgets)
            stepwise = not isinstance(control, BudgetControl)
            if isinstance(control, BudgetControl):
                if control.depth == "random":
                    raise ValueError('depth is "random"; plans are priced at one depth, such as depth=2')
                depths = np.array([control.depth])
            else:
                depths = np.arange(control.max_depth + 1)
            self.sizes = np.repeat(depths, len(offered))
            self.budgets = np.tile(np.arange(len(offered)), len(depths))
            stops = np.array([level_slice(depth, control.width).stop for depth in self.sizes.tolist()])
            self.nodes = np.minimum(offered[self.budgets], stops)
        else:
            raise ValueError(
                f"plans are made of cycles of SpecDepth-v0, SpecBudget-v0, SpecTree-v0 and SpecK-v0, not of {control.name} "
                "with these settings"
            )
        self.stepwise = stepwise
        self.deepest = int(getattr(control, "k_max", control.max_depth))  # type: ignore[attr-defined]
        self.levels = self.deepest + 1 if stepwise else 1
        self.first = int(isinstance(control, DepthControl))
        self.made = self.first if stepwise or self.copies else int(self.sizes[0])
        starts = [place.start for name, place in control.slices.items() if name in UNCHANGED]
        self.own = 0 if self.copies and not stepwise else min(starts, default=control.observation_space.shape[0])  # type: ignore[index]
        if "expansions" not in control.slices and "drafted" not in control.slices and stepwise:
            raise ValueError(
                f'the observation {control.observation!r} lacks what is drafted; pass observation="default"'
            )

    def level(self, observations: np.ndarray) -> np.ndarray:
        """At which level each of the observations ``[n, …]`` was made."""
        if not self.stepwise:
            return np.zeros(len(observations), np.int64)
        name = "drafted" if self.copies else "expansions"
        share = observations[:, self.control.slices[name].start]
        return np.rint(share * self.deepest).astype(np.int64)

    def open(self, level: np.ndarray) -> np.ndarray:
        """Which plans are still there at those levels, ``[…, plans]`` (bool)."""
        if not self.stepwise:
            return np.ones((*np.shape(level), len(self.sizes)), bool)
        return self.sizes >= np.asarray(level)[..., None]

    def actions(self, level: np.ndarray, plan: np.ndarray) -> np.ndarray:
        """The actions that follow plans ``[n]`` at levels ``[n]``."""
        control, goes_on = self.control, self.sizes[plan] > level
        if isinstance(control, DepthControl):
            return np.where(goes_on, EXPAND, VERIFY)
        if isinstance(control, TreeControl):
            return np.where(goes_on, 0, 1 + self.budgets[plan])
        if isinstance(control, KControl):
            return np.where(goes_on, DRAFT, 0) if self.stepwise else plan
        return self.budgets[plan]

    @property
    def going_on(self) -> int:
        """The action that drafts another level or token, of a control that decides at each."""
        largest = len(self.sizes) - 1
        return int(self.actions(np.zeros(1, np.int64), np.array([largest]))[0])

    def stopping(self) -> np.ndarray:
        """The action ``[plans]`` that ends a cycle with each plan, once it is drafted."""
        every = np.arange(len(self.sizes))
        return self.actions(self.sizes, every)

    def verification(self, table: CostTable) -> np.ndarray:
        """Seconds of verifying each plan's nodes, ``[plans]``."""
        return np.array([table.seconds("verify", n + 1) for n in self.nodes.tolist()])

    def forward(self, table: CostTable) -> float:
        """Seconds of drafting a further level or token."""
        return table.seconds("draft", self.control.width)
