"""Chains under way in many environments."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from spec_envs.controls.observation.entries import TASKS, WINDOWS
from spec_envs.controls.observation.recorded import RecordedChains
from spec_envs.controls.observation.text_kind import FRESH, KINDS, OPENING, SNIPPET, kind_of_answer
from spec_envs.decoding import catch_up
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.drafters.lookup import LONGEST
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.decoding.traces.trace import Trace
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.text import Detokenizer
from spec_envs.vector.cycles import CycleTable
from spec_envs.vector.draws import Draws
from spec_envs.vector.prices import costs_observed, prices
from spec_envs.vector.recent import Recent
from spec_envs.vector.trees import Outcome


@functools.cache
def kinds(trace: Trace | PortfolioTrace) -> np.ndarray:
    """Return the kind of text at every row ``[rows]``, as an index into ``KINDS``."""
    detokenize = Detokenizer.of(load_tokenizer(trace.manifest.target))
    tokens, found = trace.columns["tokens"], np.zeros(trace.rows, np.int8)
    for text, start, end in zip(trace.texts, trace.starts, trace.starts[1:], strict=False):
        for row in range(start, end):
            emitted = tokens[start : row + 1]
            tail = [*text.prompt[-SNIPPET:], *emitted[-SNIPPET:].tolist()]
            found[row] = KINDS.index(kind_of_answer(tail, emitted[:OPENING].tolist(), detokenize))
    return found


class Chains:
    """The chains under way in many environments.

    Args:
        cycles: the cycles of the control on the trace.
        tables: cost tables.
        count: number of environments.
        draws: generators of the environments; nothing is drawn from them, because every chain begins empty.

    Attributes:
        row: row of the trace at which each environment is.
        size: number of tokens of each chain.
        clock: index of the cost table that prices each environment's forwards.
        unread: tokens of each text that no forward of the drafter has read.
        read: tokens of each chain that a forward has read.
    """

    def __init__(self, cycles: CycleTable, tables: Sequence[CostTable], count: int, draws: Draws):
        self.cycles, self.plans, self.control = cycles, cycles.plans, cycles.control
        trace, k_max, slices = cycles.trace, cycles.plans.deepest, cycles.control.slices
        self.length, self.copied = cycles.drafted[:, -1].copy(), np.pad(cycles.copied, ((0, 0), (0, 1)))
        self.matched = np.minimum(1.0, np.asarray(trace.columns["matched"]) / LONGEST).astype(np.float32)
        longest = trace.manifest.max_new_tokens + k_max + 1  # all of them copied, and read by no forward so far
        self.forward = prices(tables, "draft", longest)
        self.verification = prices(tables, "verify", int(cycles.nodes.max()) + 1)
        self.further = cycles.later(self.forward)
        lengths = np.array([len(text.prompt) for text in trace.texts])
        self.text_of = np.repeat(np.arange(len(lengths)), np.diff(trace.starts))
        self.kinds = kinds(trace) if "kind" in slices else None
        known = (*TASKS, "")
        self.task = np.array([known.index(t.task) if t.task in known else len(TASKS) for t in trace.texts])
        self.row, self.size, self.clock = (np.zeros(count, np.int64) for _ in range(3))
        self.unread, self.read, self.before = (np.zeros(count, np.int64) for _ in range(3))
        self.kind_row = np.zeros(count, np.int64)
        self.recent = Recent(WINDOWS, count, 2)  # accepted and drafted tokens
        self.decided = np.zeros((count, 2))  # accepted and drafted tokens of the last decision
        self.means = chain_means(cycles) if "confidence" in slices else None
        self.last = np.zeros((count, 2), np.float32)  # means over the last chain
        self.costs = costs_observed(tables, self.control)

    def start(self, which: np.ndarray) -> np.ndarray:
        """Begin texts; return 0 seconds, since nothing is drafted before the first decision."""
        self.size[which] = self.read[which] = 0
        self.unread[which] = 1
        self.recent.clear(which)
        self.decided[which] = 0
        self.last[which] = 0.0
        self.kind_row[which] = self.row[which]
        return np.zeros(len(which))

    def act(self, actions: np.ndarray, live: np.ndarray | bool = True) -> Outcome:
        """Carry out a decision of every environment that is ``live``."""
        return self._by_token(actions, live) if self.plans.stepwise else self._by_cycle(actions, live)

    def _by_cycle(self, actions: np.ndarray, live: np.ndarray | bool) -> Outcome:
        row, clock, cycles = self.row, self.clock, self.cycles
        self.size = np.minimum(actions, self.length[row]) * live
        first = cycles.first[row]
        asked = first < self.size
        rows = np.where(asked, catch_up.rows(self.unread, first), 0)
        seconds = asked * self.forward[clock, rows] + self.further[clock, row, self.size]
        self.unread *= ~asked
        self.read = cycles.read[row, self.size]
        return self._outcome(np.ones(len(actions), bool) & live, seconds)

    def _by_token(self, actions: np.ndarray, live: np.ndarray | bool) -> Outcome:
        row = self.row
        grows = (actions == self.plans.drafts) & (self.size < self.length[row]) & live
        asked = grows & ~self.copied[row, self.size]
        rows = np.where(asked, catch_up.rows(self.unread, self.size, self.read), 0)
        self.read = np.where(asked, self.size, self.read)
        self.unread *= ~asked
        self.size = self.size + grows
        verified = (~grows | (self.size == self.plans.deepest)) & live
        return self._outcome(verified, self.forward[self.clock, rows])

    def _outcome(self, verified: np.ndarray, seconds: np.ndarray) -> Outcome:
        accepted, sent, beside = (
            getattr(self.cycles, name)[self.row, self.size] for name in ("accepted", "nodes", "beside")
        )
        self.before = self.row.copy()
        verify = verified * self.verification[self.clock, sent + 1]
        return Outcome(verified, accepted, self.size, sent, seconds, verify, beside=beside)

    def verified(
        self, which: np.ndarray, accepted: np.ndarray, emitted: np.ndarray, finished: np.ndarray
    ) -> np.ndarray:
        """Record the verified chains and the tokens that are left to read; return 0 seconds, since nothing is drafted
        before the next decision."""
        size, row = self.size[which], self.before[which]
        self.unread[which] = catch_up.left_unread(
            self.unread[which], self.read[which], emitted[which], self.cycles.right[row]
        )
        chain = np.minimum(accepted[which], self.cycles.right[row])  # without an alternative
        self.decided[which] = np.stack([chain, size], 1)
        self.recent.push(which, self.decided[which].astype(np.int32))
        if self.means is not None:
            self.last[which] = self.means[row, size]
        self.read[which] = self.size[which] = 0
        stale = self.row[which] >= self.kind_row[which] + FRESH
        self.kind_row[which] = np.where(stale, self.row[which], self.kind_row[which])
        return np.zeros(len(which))

    def observe(self, out: np.ndarray, which: np.ndarray | slice, alive: np.ndarray) -> None:
        """Write the observations of the chains of ``which`` into ``out``; texts that have ended show no copy."""
        slices, row = self.control.slices, self.row[which]
        if self.control.draft_columns:
            observed = self.cycles.observed
            out[:, : self.control.draft_columns] = observed.reshape(-1, observed.shape[2]).take(
                row * observed.shape[1] + self.size[which], 0
            )
            out[:, slices["free"].start] *= alive
        if self.means is not None:
            out[:, slices["confidence"].start : slices["entropy"].stop] = self.last[which]
        if "match" in slices:
            out[:, slices["match"].start] = self.matched[row] * alive
        at, decided = slices["acceptance"].start, self.decided[which]
        for i, sums in enumerate(self.recent.sums):
            out[:, at + i] = sums[which, 0] / np.maximum(1, sums[which, 1])
        out[:, slices["last_k"].start] = decided[:, 1] / self.plans.deepest
        out[:, slices["last_acceptance"].start] = decided[:, 0] / np.maximum(1, decided[:, 1])
        if self.kinds is not None:
            out[:, slices["kind"]] = np.eye(len(KINDS), dtype=np.float32).take(self.kinds[self.kind_row[which]], 0)
        if "task" in slices:
            out[:, slices["task"]] = np.eye(len(TASKS) + 1, dtype=np.float32).take(self.task[self.text_of[row]], 0)
        if self.costs is not None:
            out[:, slices["costs"]] = self.costs[self.clock[which]]


def chain_means(cycles: CycleTable) -> np.ndarray:
    """Return the mean probability and entropy of every chain, ``[rows, K + 1, 2]``, float32."""
    return RecordedChains(cycles.trace, cycles.plans.deepest).means()
