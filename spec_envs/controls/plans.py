"""Every way in which a cycle can continue from a decision, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.full_trees import level_slice


class Prices(NamedTuple):
    """Seconds under a cost table: of drafting a further level or token, of verifying each plan's nodes ``[plans]``, and of
    verifying one alternative more beside a chain."""

    forward: float
    verification: np.ndarray
    alternative: float


@dataclass(frozen=True, eq=False)
class Plans:
    """The plans of a cycle, each a size to draft to and a budget to verify. They are ordered by size, and every size
    has the same budgets.

    Attributes:
        sizes: ``[plans]``, expansions of a tree, or tokens of a chain.
        budgets: ``[plans]``, the most drafted nodes that are then verified.
        candidates: ``[plans]``, nodes drafted.
        ends: ``[plans]``, the action that ends a cycle with each plan, once it is drafted.
        drafts: the action that drafts a further level or token, where a decision is made after each; None where a cycle
            is one decision.
        made: expansions or tokens that are drafted before the first decision of every cycle; None if that is drawn from
            ``sizes`` for each cycle.
        runs_out: True if a cycle that reaches the largest size is verified within the same step.
        chain: True if chains are drafted, some of whose tokens may be copied at no cost.
        width: rows of the forward that drafts a further level or token.
        shown: index of the observation's number that shows the size drafted so far, as a share of the largest; None
            where it is not shown.
        block: for a drafter of blocks the rows of the first forward besides the root, which drafts all levels; None
            where each level takes a forward.
        copied: tokens of the longest chain of copies that is drafted, whole, in place of a tree of any size; 0 where
            nothing is copied in front of a head.
        alternatives: most tokens that are verified beside each token of a chain.
        least: lowest log-probability of the path to such a token.
    """

    sizes: np.ndarray
    budgets: np.ndarray
    candidates: np.ndarray
    ends: np.ndarray
    drafts: int | None = None
    made: int | None = 0
    runs_out: bool = False
    chain: bool = False
    width: int = 1
    shown: int | None = None
    block: int | None = None
    copied: int = 0
    alternatives: int = 0
    least: float = 0.0

    @property
    def stepwise(self) -> bool:
        """True if a decision is made after every level or token."""
        return self.drafts is not None

    @property
    def deepest(self) -> int:
        """The largest size."""
        return int(self.sizes[-1])

    @property
    def offered(self) -> int:
        """Number of budgets of every size."""
        return int((self.sizes == self.sizes[0]).sum())

    @property
    def nodes(self) -> np.ndarray:
        """Nodes that are verified under each plan, ``[plans]``."""
        nodes: np.ndarray = np.minimum(self.budgets, self.candidates)
        return nodes

    @property
    def longest(self) -> np.ndarray:
        """Most tokens that each plan of a tree can accept, ``[plans]``: a path of it, or copies."""
        longest: np.ndarray = np.maximum(np.minimum(self.sizes + 1, self.nodes), np.minimum(self.budgets, self.copied))
        return longest

    @property
    def levels(self) -> int:
        """Most decisions of a cycle. At level i, i expansions are made or tokens drafted; a control that decides once
        has one level."""
        return self.deepest + 1 if self.stepwise else 1

    @property
    def first(self) -> int:
        """Level of the first decision of a cycle."""
        return self.made or 0 if self.stepwise else 0

    @property
    def names(self) -> list[tuple[int, ...]]:
        """The numbers that name each plan, which are a chain's length, or a tree's depth and budget."""
        columns = (self.sizes,) if self.chain else (self.sizes, self.budgets)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def settled(self) -> Plans:
        """Return these plans, in which every cycle has to begin at the same size.

        Raises:
            ValueError: the size is drawn, so that a plan has no price of its own.
        """
        if self.made is None:
            raise ValueError('depth is "random"; plans are priced at one depth, such as depth=2')
        return self

    def level(self, observations: np.ndarray) -> np.ndarray:
        """Return the level ``[n]`` at which each of the observations ``[n, numbers]`` was made."""
        if not self.stepwise:
            return np.zeros(len(observations), np.int64)
        level: np.ndarray = np.rint(observations[:, self.shown] * self.deepest).astype(np.int64)
        return level

    def open(self, level: np.ndarray) -> np.ndarray:
        """Return True for the plans that can still be followed at those levels, ``[…, plans]``."""
        if not self.stepwise:
            return np.ones((*np.shape(level), len(self.sizes)), bool)
        reached: np.ndarray = self.sizes >= np.asarray(level)[..., None]
        return reached

    def actions(self, level: np.ndarray, plan: np.ndarray) -> np.ndarray:
        """Return the actions ``[n]`` that follow plans ``[n]`` at levels ``[n]``."""
        ends: np.ndarray = self.ends[plan]
        return ends if self.drafts is None else np.where(self.sizes[plan] > level, self.drafts, ends)

    def ended_by(self, actions: int) -> np.ndarray:
        """Return which of a size's plans each action ends, ``[actions]``. Where nothing more can be drafted, the action
        that drafts ends the last one."""
        found = np.full(actions, self.offered - 1)
        found[self.ends[: self.offered]] = np.arange(self.offered)
        return found

    def verification(self, table: CostTable) -> np.ndarray:
        """Return the seconds of verifying each plan's nodes, ``[plans]``."""
        return np.array([table.seconds("verify", n + 1) for n in self.nodes.tolist()])

    def forward(self, table: CostTable) -> float:
        """Return the seconds of drafting a further level or token."""
        return table.seconds("draft", self.width) if self.block is None else 0.0

    def prices(self, table: CostTable) -> Prices:
        """Return the prices of the plans. An alternative costs what a row more does beside chains of up to half of the
        longest."""
        half = 1 + self.deepest // 2
        rows = table.seconds("verify", 1 + half) - table.seconds("verify", 2)
        return Prices(self.forward(table), self.verification(table), rows / max(1, half - 1))

    def catching_up(self, table: CostTable) -> np.ndarray:
        """Return by how many seconds the first forward of each plan costs more if its drafter has not read that many
        rows of the text, ``[plans, rows]``; ``[1, 1]`` where that is not known before the drafter is asked."""
        return np.zeros((1, 1))

    def unread(self, observations: np.ndarray) -> np.ndarray:
        """Return how many rows the drafter of each plan has not read, ``[n, plans]``, at observations
        ``[n, numbers]``; ``[n, 1]`` zeros where that is not observed."""
        return np.zeros((len(observations), 1), np.int64)

    def before(self, table: CostTable) -> float:
        """Return the seconds of what every cycle drafts before its first decision."""
        if self.chain:
            return 0.0
        return table.seconds("draft", 1 + (self.block or 0)) + (self.made or 0) * self.forward(table)


@dataclass(frozen=True, eq=False)
class ChoicePlans(Plans):
    """The plans of a cycle that one of several drafters drafts: one for every action.

    Attributes:
        drafts_by: for each plan the forwards of its drafter, once that has read the text: curve of the cost table and
            rows.
        lags: which of the observation's numbers shows how many rows the drafter of each plan has not read, ``[plans]``;
            any where nobody drafts.
        lag_unit: rows that it shows as 1, which is the most that it shows.
    """

    drafts_by: Sequence[Sequence[tuple[str, int]]] = ()
    lags: tuple[int, ...] = ()
    lag_unit: int = 1

    def verification(self, table: CostTable) -> np.ndarray:
        """Return the seconds of drafting and of verifying each plan, ``[plans]``."""
        drafting = [sum(table.seconds(*forward) for forward in forwards) for forwards in self.drafts_by]
        seconds: np.ndarray = super().verification(table) + drafting
        return seconds

    def forward(self, table: CostTable) -> float:
        """Return 0, because what each plan drafts has a price of its own."""
        return 0.0

    def catching_up(self, table: CostTable) -> np.ndarray:
        """Return the seconds ``[plans, lag_unit + 1]``; see ``Plans``. A drafter that copies first is priced as if it
        copied nothing, because what it will copy is not known before it is asked."""
        found = np.zeros((len(self.sizes), self.lag_unit + 1))
        for seconds, forwards in zip(found, self.drafts_by, strict=True):
            for curve, rows in forwards[:1]:
                more = [table.seconds(curve, rows + unread) for unread in range(self.lag_unit)]
                seconds[1:] = np.array(more) - more[0]
        return found

    def unread(self, observations: np.ndarray) -> np.ndarray:
        rows: np.ndarray = np.rint(observations[:, list(self.lags)] * self.lag_unit).astype(np.int64)
        return rows

    def before(self, table: CostTable) -> float:
        """Return 0, because who drafts is decided first."""
        return 0.0


def tree_plans(
    depths: Sequence[int],
    budgets: Sequence[int],
    width: int,
    first_end: int,
    drafts: int | None = None,
    made: int | None = 0,
    runs_out: bool = False,
    shown: int | None = None,
) -> Plans:
    """Return the plans of trees of all of these depths, each verified with all of these budgets.

    Args:
        first_end: action that ends a cycle with the first budget; those of the others follow it.
        drafts, made, runs_out, shown: see ``Plans``.
    """
    sizes, offered = np.repeat(depths, len(budgets)), np.tile(budgets, len(depths))
    candidates = np.array([level_slice(depth, width).stop for depth in sizes.tolist()])
    ends = np.tile(np.arange(first_end, first_end + len(budgets)), len(depths))
    return Plans(sizes, offered, candidates, ends, drafts, made, runs_out, False, width, shown)


def chain_plans(
    k_max: int,
    drafts: int | None = None,
    shown: int | None = None,
    alternatives: int = 0,
    least: float = 0.0,
) -> Plans:
    """Return the plans of chains of up to ``k_max`` tokens, which are verified whole.

    Args:
        drafts, shown, alternatives, least: see ``Plans``. Where chains are drafted token by token, action 0 verifies; else action K drafts K
            tokens.
    """
    sizes = np.arange(k_max + 1)
    ends = sizes if drafts is None else np.zeros(k_max + 1, np.int64)
    runs_out = drafts is not None
    return Plans(
        *(sizes, sizes, sizes, ends, drafts, 0, runs_out, True, 1, shown), alternatives=alternatives, least=least
    )
