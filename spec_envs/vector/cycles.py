"""The table of every cycle that can begin at a position of a trace: tokens that each plan accepts, forwards that it
takes, and observations."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from spec_envs.controls.base import Control
from spec_envs.controls.observation.recorded import RecordedChains, RecordedTrees, copied_tokens
from spec_envs.controls.plans import Plans
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.traces.full_trees import level_slice, sizes
from spec_envs.decoding.traces.trace import Trace
from spec_envs.decoding.tree import NEVER

CHUNK = 2048  # rows whose observed entries are computed together


class CycleTable:
    """The cycles of a control on a trace, by row of the trace and plan of the control.

    Args:
        trace: a trace of the kind that replays the control.
        control: the control.
        plans: by default those of the control.

    Attributes:
        plans: the plans of the control.
        sizes: ``[sizes]``, the different sizes of the plans.
        accepted: ``[rows, plans]``, tokens of the text among the verified nodes.
        drafted, nodes: ``[rows, plans]``, nodes drafted, and how many are verified, the alternatives of a chain included.
        further: ``[rows, plans]``, alternatives beside a chain that are verified.
        beside: ``[rows, plans]``, 1 where the last accepted token is not of a chain but an alternative beside it.
        asked: ``[rows, plans]``, True if the drafter makes a forward.
        forwards: ``[rows, plans]``, forwards after the first decision.
        first: ``[rows]``, rows of the first forward besides those of unread tokens: tokens that are copied before the
            one that it drafts, or the block that it drafts.
        expansion: rows of the forward that grows a tree by a level; 0 where the first one drafts all levels.
        gaps: ``[rows, largest size]``, rows of the forward that drafts each further level or token. They are 0 if there
            is no forward, and for the first one, whose rows depend on the unread tokens of the text
            (``spec_envs.decoding.catch_up``).
        read: ``[rows, plans]``, tokens of a chain that forwards have read once it is drafted.
        right: ``[rows]``, how many first tokens of a chain are the text's.
        deepest: ``[rows]``, the largest size that can be drafted; of trees only.
        whole: ``[rows]``, True for copies before a head, which are drafted to that size at once; of trees only.
        copied: of trees ``[rows]``, True for copies, which take no forward; of chains ``[rows, largest size]``, the same
            for each token.
    """

    def __init__(self, trace: Trace, control: Control, plans: Plans | None = None):
        self.trace, self.control, self.plans = trace, control, plans or control.plans()
        self.sizes = np.unique(self.plans.sizes)
        if self.plans.chain:
            self._read_chains()
        else:
            self._read_trees()

    def _read_trees(self) -> None:
        plans, columns, manifest = self.plans, self.trace.columns, self.trace.manifest
        width, most = plans.width, min(self.control.max_depth, manifest.max_depth)
        ranks = np.asarray(columns["ranks"][:, : most + 1, : most + 1])
        reached = sizes(np.asarray(columns["log_probs"][:, : level_slice(most, width).stop]), width)
        self.deepest = np.maximum(0, (np.diff(reached, axis=1, prepend=0) > 0).sum(1) - 1)
        self.copied = np.asarray(columns["copied"])
        self.whole = self.copied & bool(DrafterName.parse(manifest.drafter).model)
        every, drafted = np.arange(len(ranks)), np.where(self.whole[:, None], most, plans.sizes)
        self.accepted = np.empty(drafted.shape, np.int16)
        for i, budget in enumerate(plans.budgets.tolist()):
            at = ranks[every, drafted[:, i]]
            self.accepted[:, i] = ((at >= 0) & (at < budget)).sum(1)
        self.drafted = np.take_along_axis(reached, drafted, 1)
        self.nodes = np.minimum(self.drafted, plans.budgets)
        self.further = self.beside = np.broadcast_to(np.int64(0), self.drafted.shape)
        self.asked = np.broadcast_to(~self.copied[:, None], self.drafted.shape)
        further = np.maximum(0, plans.sizes - plans.first) if plans.stepwise else np.zeros(len(plans.sizes), np.int64)
        block = self.trace.manifest.rows_of_block(self.control.max_depth)
        self.expansion = width if block is None else 0
        self.forwards = self.asked * (further if block is None else 0 * further)
        self.gaps = np.repeat(np.where(self.copied, 0, self.expansion)[:, None], plans.deepest, 1)
        self.first, self.right = np.full(len(ranks), block or 0), np.zeros(len(ranks), np.int64)
        # the next tree has another root, so all its nodes are read again
        self.read = np.broadcast_to(np.int64(0), self.drafted.shape)

    def _read_chains(self) -> None:
        columns, k_max = self.trace.columns, self.plans.deepest
        length = np.minimum(columns["length"], k_max).astype(np.int64)
        self.right = np.minimum(columns["right"], length).astype(np.int64)
        self.drafted = np.minimum(length[:, None], self.plans.sizes)
        self.further, self.beside = self._alternatives()
        self.nodes = self.drafted + self.further
        self.accepted = np.minimum(self.right[:, None], self.plans.sizes) + self.beside
        self.copied = copied_tokens(self.trace, k_max)
        asked = ~self.copied & (np.arange(k_max) < length[:, None])
        self.forwards = np.pad(asked.cumsum(1), ((0, 0), (1, 0)))
        self.asked = self.forwards > 0
        self.first = np.where(asked.any(1), asked.argmax(1), k_max)
        self.read = np.zeros((len(length), k_max + 1), np.int16)
        self.gaps = np.zeros((len(length), k_max), np.int16)
        last = np.full(len(length), -1)
        for at in range(k_max):
            self.gaps[:, at] = np.where(asked[:, at] & (last >= 0), at - last, 0)
            last = np.where(asked[:, at], at, last)
            self.read[:, at + 1] = np.maximum(last, 0)

    def _alternatives(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how many alternatives are verified beside the chains of every plan, and where one of them is accepted,
        ``[rows, plans]``."""
        count, plans, columns = self.plans.alternatives, self.plans, self.trace.columns
        if not count:
            return (np.broadcast_to(np.int64(0), self.drafted.shape),) * 2
        k_max, rows = plans.deepest, np.arange(self.trace.rows)
        tokens = np.asarray(columns["tokens"])
        paths = RecordedChains(self.trace, k_max).paths
        above = np.pad(paths[:, :-1], ((0, 0), (1, 0)))
        scores = np.asarray(columns["alternative_log_probs"][:, :k_max, :count]) + above[:, :, None]
        kept = (scores >= np.float32(plans.least)) & (scores > NEVER)
        verified = np.pad(kept.sum(2).cumsum(1), ((0, 0), (1, 0)))
        wrong = np.minimum(self.right, k_max - 1)  # the first token of the chain that is not the text's
        ends = np.repeat(self.trace.starts[1:], np.diff(self.trace.starts))
        following = rows + 1 + self.right
        own = tokens[np.minimum(following, len(tokens) - 1)]
        found = kept[rows, wrong] & (np.asarray(columns["alternatives"])[rows, wrong, :count] == own[:, None])
        caught = found.any(1) & (following < ends)
        return np.take_along_axis(verified, self.drafted, 1), caught[:, None] & (self.right[:, None] < self.drafted)

    def later(self, draft: np.ndarray) -> np.ndarray:
        """Return the seconds of a cycle's forwards after its first one, ``[tables, rows, plans]``.

        Args:
            draft: seconds of a forward by its rows, ``[tables, most rows + 1]``.
        """
        seconds = draft[:, self.gaps].cumsum(2)
        return np.pad(seconds, ((0, 0), (0, 0), (1, 0))).take(self.plans.sizes, 2)

    @cached_property
    def recorded(self) -> RecordedTrees | RecordedChains:
        """The trees or chains that were drafted at every position of the trace."""
        if self.plans.chain:
            return RecordedChains(self.trace, self.plans.deepest)
        return RecordedTrees(self.trace, self.control.max_depth, self.control.width)

    @cached_property
    def observed(self) -> np.ndarray:
        """Observation of what a cycle has drafted, ``[rows, sizes, control.draft_columns]``, float32."""
        own, space = self.control.draft_columns, self.control.observation_space
        found = np.zeros((self.trace.rows, len(self.sizes), own), np.float32)
        for begin in range(0, len(found), CHUNK):
            rows = np.arange(begin, min(begin + CHUNK, len(found)))
            for i, size in enumerate(self.sizes):
                shown = self.read_entries(rows, np.full(len(rows), size))
                found[rows, i] = np.clip(shown, space.low[:own], space.high[:own])
        return found

    def read_entries(self, row: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Return the observation ``[n, control.draft_columns]`` of what cycles have drafted.

        Args:
            row: ``[n]``, rows of the trace at which the cycles begin.
            size: ``[n]``, sizes that they have drafted.
        """
        found = np.zeros((len(row), self.control.draft_columns), np.float32)
        if not self.plans.chain:
            size = np.where(self.whole[row], self.deepest[row], np.minimum(size, self.deepest[row]))
        for entry in self.control.entries:
            if entry.recorded:
                shown = entry.recorded(self.recorded, row, size)
                found[:, self.control.slices[entry.name]] = shown.reshape(len(row), -1)
        return found
