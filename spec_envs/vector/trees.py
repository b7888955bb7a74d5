"""Many draft trees of a trace at once: what is accepted, what it costs and what is observed are look-ups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spec_envs.controls.base import COST_ROWS
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.tree import ENTROPY_UNIT, TreeControl
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.full_trees import grown, level_slice
from spec_envs.decoding.traces.trace import Trace
from spec_envs.vector.draws import Draws
from spec_envs.vector.prices import prices


class Outcome(NamedTuple):
    """What an action led to, for each environment: whether the cycle ended; then how many tokens of the text were
    drafted right, how many candidates there were and how many of them were verified; the seconds of both sides."""

    verified: np.ndarray
    accepted: np.ndarray
    drafted: np.ndarray
    sent: np.ndarray
    draft: np.ndarray
    verify: np.ndarray


class TreeTables(NamedTuple):
    """What a control of trees needs of a trace, by row and depth.

    ``accepted`` ``[rows, D + 1, budgets]``; ``static`` ``[rows, D + 1, features]``, what is observed of the tree;
    ``scores`` ``[rows, C]``.
    """

    accepted: np.ndarray
    static: np.ndarray
    scores: np.ndarray


def tree_tables(trace: Trace, control: DepthControl | BudgetControl | TreeControl) -> TreeTables:
    """The tables of a control; budgets are its own, of ``SpecDepth-v0`` the one that it verifies."""
    width, depth = control.width, control.max_depth
    nodes = level_slice(depth, width).stop
    tree = grown(np.asarray(trace.columns["log_probs"][:, :nodes]), width)
    accepted = accepted_table(trace, budgets_of(control), depth)
    columns = [] if control.observation == "ltd" else static_columns(trace, control, tree.scores, tree.frontiers)
    static = np.concatenate(columns, 2) if columns else np.zeros((trace.rows, depth + 1, 0), np.float32)
    return TreeTables(accepted, np.ascontiguousarray(static, np.float32), tree.scores)


def budgets_of(control: DepthControl | BudgetControl | TreeControl) -> tuple[int, ...]:
    """The budgets that a control offers."""
    return (control.budget,) if isinstance(control, DepthControl) else control.budgets


def accepted_table(trace: Trace, budgets: Sequence[int], max_depth: int) -> np.ndarray:
    """Accepted tokens ``[rows, max_depth + 1, budgets]`` (int8) of every depth and budget at every position."""
    ranks = np.asarray(trace.columns["ranks"][:, : max_depth + 1, : max_depth + 1])
    inside = [((ranks >= 0) & (ranks < budget)).sum(2) for budget in budgets]
    return np.stack(inside, 2).astype(np.int8)


def static_columns(
    trace: Trace, control: DepthControl | BudgetControl | TreeControl, scores: np.ndarray, frontiers: np.ndarray
) -> list[np.ndarray]:
    """The observation's ranges that depend on the tree alone, in their order, each ``[rows, D + 1, size]``."""
    width, depth = control.width, control.max_depth
    rows, levels = len(scores), np.arange(depth + 1)
    stops = [level_slice(level, width).stop for level in range(depth + 1)]
    columns: dict[str, np.ndarray] = {}
    if "frontier" in control.slices:
        picked = np.take_along_axis(scores, frontiers.reshape(rows, -1).astype(np.intp), 1)
        columns["frontier"] = np.exp(picked).reshape(rows, depth + 1, width)
    probabilities = np.exp(scores)
    survival = np.add.reduceat(probabilities, [0, *stops[:-1]], 1)
    columns["survival"] = np.where(levels[None, :] <= levels[:, None], survival[:, None, :], np.float32(0))
    if "gains" in control.slices:
        gains = []
        for stop in stops:
            best = np.exp(-np.sort(-scores[:, :stop], 1))
            below = np.concatenate([np.zeros((rows, 1)), best.cumsum(1)], 1)
            reached = below[:, np.minimum(budgets_of(control), stop)]
            gains.append(np.diff(reached, prepend=0.0, axis=1) / (depth + 1))
        columns["gains"] = np.stack(gains, 1)
    if "entropy" in control.slices:
        firsts = [0, *(1 + width * (level - 1) for level in levels[1:])]
        columns["entropy"] = trace.columns["entropies"][:, firsts][:, :, None] / ENTROPY_UNIT
    columns["expansions"] = np.broadcast_to((levels / depth)[None, :, None], (rows, depth + 1, 1))
    ordered = [entry.name for entry in control.entries if entry.name in columns]
    return [np.clip(columns[name], 0.0, 1.0).astype(np.float32) for name in ordered]


class Trees:
    """Trees under way in many environments.

    Attributes:
        row: of the trace, where each environment's text is.
        depth: expansions of each tree.
    """

    def __init__(
        self,
        trace: Trace,
        control: DepthControl | BudgetControl | TreeControl,
        tables: Sequence[CostTable],
        count: int,
        draws: Draws,
    ):
        self.control, self.draws = control, draws
        self.tables, self.deepest = tree_tables(trace, control), control.max_depth
        self.budgets = np.array(budgets_of(control))
        width = control.width
        self.candidates = np.array([level_slice(level, width).stop for level in range(self.deepest + 1)])
        self.expansion = prices(tables, "draft", width)[:, width]
        self.root = prices(tables, "draft", self.deepest + 2)
        sent = np.minimum(self.budgets[None], self.candidates[:, None])  # [D + 1, budgets]
        self.sent = sent
        verify = prices(tables, "verify", int(sent.max()) + 1)
        self.verification = verify[:, sent + 1]  # [tables, D + 1, budgets]
        self.row, self.depth = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.clock = np.zeros(count, np.int64)
        self.costs = costs_shown(tables, width) if control.cost_features else None

    def start(self, which: np.ndarray) -> np.ndarray:
        """First trees of texts; seconds of drafting them."""
        return self.draft(which, np.ones(len(which), np.int64))

    def draft(self, which: np.ndarray, unread: np.ndarray) -> np.ndarray:
        """What the first decision of a cycle needs is drafted; its seconds. ``unread`` tokens have joined the text."""
        control, clock = self.control, self.clock[which]
        if isinstance(control, TreeControl):
            depth = np.zeros(len(which), np.int64)
        elif isinstance(control, DepthControl):
            depth = np.ones(len(which), np.int64)
        elif control.depth == "random":
            depth = 1 + self.draws.integers(which, self.deepest)
        else:
            depth = np.full(len(which), control.depth)
        self.depth[which] = depth
        return self.root[clock, unread] + depth * self.expansion[clock]

    def act(self, actions: np.ndarray, live: np.ndarray | bool = True) -> Outcome:
        """Carry out a decision of every environment that is ``live``."""
        budget: np.ndarray | int
        if isinstance(self.control, TreeControl):
            grows = (actions == 0) & (self.depth < self.deepest)
            verified, budget = ~grows, actions - 1  # of the last level, -1 is the largest
        elif isinstance(self.control, DepthControl):
            grows = actions == 1
            verified, budget = ~grows | (self.depth + 1 == self.deepest), 0
        else:
            grows, verified, budget = np.zeros(len(actions), bool), np.ones(len(actions), bool), actions
        grows, verified = grows & live, verified & live
        self.depth += grows
        return Outcome(
            verified,
            self.tables.accepted[self.row, self.depth, budget],
            self.candidates[self.depth],
            self.sent[self.depth, budget],
            grows * self.expansion[self.clock],
            verified * self.verification[self.clock, self.depth, budget],
        )

    def verified(
        self, which: np.ndarray, accepted: np.ndarray, emitted: np.ndarray, outcome: Outcome, finished: np.ndarray
    ) -> np.ndarray:
        """Draft the next trees of texts that go on; return the seconds of drafting them, 0 for texts that have ended."""
        goes_on = ~finished[which]
        seconds = np.zeros(len(which))
        seconds[goes_on] = self.draft(which[goes_on], emitted[which[goes_on]])
        return seconds

    def observe(self, out: np.ndarray, which: np.ndarray | slice, alive: np.ndarray) -> None:
        """Fill in what is seen of the trees of ``which``; nothing of texts that have ended."""
        row, depth = self.row[which], self.depth[which]
        if self.control.observation == "ltd":
            self._observe_published(out, row, depth, alive)
        else:
            static = self.tables.static
            found = static.reshape(-1, static.shape[2]).take(row * static.shape[1] + depth, axis=0)
            if not alive.all():
                found[~alive] = 0.0
            out[:, : found.shape[1]] = found
        if self.costs is not None:
            out[:, self.control.slices["costs"]] = self.costs[self.clock[which]]

    def _observe_published(self, out: np.ndarray, row: np.ndarray, depth: np.ndarray, alive: np.ndarray) -> None:
        """The scores of Learning to Draft: of the last level, or of the whole tree."""
        where, width = self.control.slices["scores"], self.control.width
        if isinstance(self.control, DepthControl):
            starts = np.where(depth > 0, width + width * width * (depth - 1), 0)
            columns = starts[:, None] + np.arange(width * width)
            shown = columns < self.candidates[depth][:, None]
            scores = self.tables.scores[row[:, None], np.where(shown, columns, 0)]
        else:
            shown = np.arange(self.tables.scores.shape[1]) < self.candidates[depth][:, None]
            scores = self.tables.scores[row]
        out[:, where] = np.where(shown & alive[:, None], scores, 0.0)
        out[:, self.control.slices["depth"]] = (depth / 10 * alive)[:, None]


def costs_shown(tables: Sequence[CostTable], width: int) -> np.ndarray:
    """What ``cost_features`` show of each table, ``[tables, …]``; see ``Control``."""
    shown = []
    for table in tables:
        plain = table.seconds("verify", 1)
        ratios = [plain / table.seconds("verify", n) for n in COST_ROWS]
        shown.append([*ratios, table.seconds("draft", width) / plain])
    return np.clip(np.array(shown, np.float32), 0.0, 1.0)
