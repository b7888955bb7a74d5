"""Many chains of a trace at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spec_envs.controls.k import ENTROPY_UNIT, FRESH, OPENING, SNIPPET, WINDOWS, KControl, told_kind
from spec_envs.controls.text_kind import KINDS
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.drafters.lookup import LONGEST
from spec_envs.decoding.traces.trace import Trace
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.prompts.sets import TASKS
from spec_envs.text import Detokenizer
from spec_envs.vector.draws import Draws
from spec_envs.vector.prices import prices
from spec_envs.vector.recent import Recent
from spec_envs.vector.trees import Outcome, costs_shown


class ChainTables(NamedTuple):
    """What chains need of a trace, by row and number of tokens drafted (0…K).

    ``chain`` ``[rows, K + 1, 5]``, what is seen of a chain under way (``drafted``, ``probability``, ``entropy``, ``path``,
    ``free``); ``means`` ``[rows, K + 1, 2]`` of probabilities and entropies; ``first`` ``[rows]``, the first token that the
    draft model drafts, K if it drafts none; ``read`` ``[rows, K + 1]``, the last one; ``gaps`` ``[rows, K]``, how many rows
    its further forwards have, 0 for copies.
    """

    chain: np.ndarray
    means: np.ndarray
    first: np.ndarray
    read: np.ndarray
    gaps: np.ndarray


def chain_tables(trace: Trace, k_max: int) -> ChainTables:
    """The tables of chains of up to ``k_max`` tokens."""
    columns = {name: np.asarray(trace.columns[name]) for name in ("log_probs", "entropies", "copied", "length")}
    rows = trace.rows
    scores = columns["log_probs"][:, :k_max].cumsum(1, dtype=np.float32)
    steps = scores.copy()
    steps[:, 1:] -= scores[:, :-1]
    probabilities, path = np.exp(steps), np.exp(scores)
    entropies = columns["entropies"][:, :k_max]
    copied = columns["copied"][:, :k_max] & (np.arange(k_max) < columns["length"][:, None])
    chain = np.zeros((rows, k_max + 1, 5), np.float32)
    chain[:, :, 0] = np.arange(k_max + 1) / k_max
    chain[:, 0, 1], chain[:, 0, 3] = 1.0, 1.0
    chain[:, 1:, 1], chain[:, 1:, 3] = probabilities, path
    chain[:, 1:, 2] = np.minimum(1.0, entropies / ENTROPY_UNIT)
    chain[:, :k_max, 4] = copied
    counts = np.maximum(1, np.arange(k_max + 1))
    totals = np.zeros((rows, k_max + 1, 2))
    totals[:, 1:, 0], totals[:, 1:, 1] = probabilities.cumsum(1), entropies.cumsum(1) / ENTROPY_UNIT
    means = np.clip(totals / counts[None, :, None], 0.0, 1.0).astype(np.float32)
    drafted = ~copied
    first = np.where(drafted.any(1), drafted.argmax(1), k_max)
    read = np.zeros((rows, k_max + 1), np.int16)
    gaps = np.zeros((rows, k_max), np.int16)
    last = np.full(rows, -1)
    for at in range(k_max):
        gaps[:, at] = np.where(drafted[:, at] & (last >= 0), at - last, 0)
        last = np.where(drafted[:, at], at, last)
        read[:, at + 1] = np.maximum(last, 0)
    return ChainTables(chain, means, first, read, gaps)


@functools.cache
def kinds(trace: Trace) -> np.ndarray:
    """The kind of text at every row, as an index into ``KINDS``."""
    detokenize = Detokenizer.of(load_tokenizer(trace.manifest.target))
    tokens, found = trace.columns["tokens"], np.zeros(trace.rows, np.int8)
    for text, start, end in zip(trace.texts, trace.starts, trace.starts[1:], strict=False):
        for row in range(start, end):
            emitted = tokens[start : row + 1]
            tail = [*text.prompt[-SNIPPET:], *emitted[-SNIPPET:].tolist()]
            found[row] = KINDS.index(told_kind(tail, emitted[:OPENING].tolist(), detokenize))
    return found


class Chains:
    """Chains under way in many environments.

    Attributes:
        row: of the trace, where each environment's text is.
        size: tokens of each chain.
    """

    def __init__(
        self, trace: Trace, control: KControl, tables: Sequence[CostTable], count: int, draws: Draws
    ):  # from which nothing is drawn: chains have no depth of their own
        self.control, self.token = control, control.decision == "token"
        self.tables, self.k_max = chain_tables(trace, control.k_max), control.k_max
        self.right = np.minimum(trace.columns["right"], trace.columns["length"]).astype(np.int64)
        self.length = np.minimum(trace.columns["length"], self.k_max).astype(np.int64)
        self.matched = np.minimum(1.0, np.asarray(trace.columns["matched"]) / LONGEST).astype(np.float32)
        longest = trace.manifest.max_new_tokens + self.k_max + 1  # copied tokens that nothing has read
        self.forward = prices(tables, "draft", longest)
        self.verification = prices(tables, "verify", self.k_max + 1)
        further = self.forward[:, self.tables.gaps]  # [tables, rows, K]
        self.further = np.concatenate([np.zeros((*further.shape[:2], 1)), further.cumsum(2)], 2)
        lengths = np.array([len(text.prompt) for text in trace.texts])
        self.text_of = np.repeat(np.arange(len(lengths)), np.diff(trace.starts))
        self.told = kinds(trace) if "kind" in control.slices else None
        known = (*TASKS, "")
        self.task = np.array([known.index(t.task) if t.task in known else len(TASKS) for t in trace.texts])
        self.row, self.size, self.clock = (np.zeros(count, np.int64) for _ in range(3))
        self.unread, self.read, self.before = (np.zeros(count, np.int64) for _ in range(3))
        self.kind_row = np.zeros(count, np.int64)
        self.recent = Recent(WINDOWS, count, 2)  # accepted and drafted tokens
        self.decided = np.zeros((count, 2))  # those of the last decision
        self.last = np.zeros((count, 2), np.float32)  # means over the last chain
        self.costs = costs_shown(tables, 1) if control.cost_features else None

    def start(self, which: np.ndarray) -> np.ndarray:
        """Texts begin; nothing is drafted before it is decided."""
        self.size[which] = self.read[which] = 0
        self.unread[which] = 1
        self.recent.clear(which)
        self.decided[which] = 0
        self.last[which] = 0.0
        self.kind_row[which] = self.row[which]
        return np.zeros(len(which))

    def act(self, actions: np.ndarray, live: np.ndarray | bool = True) -> Outcome:
        """Carry out a decision of every environment that is ``live``."""
        return self._by_token(actions, live) if self.token else self._by_cycle(actions, live)

    def _by_cycle(self, actions: np.ndarray, live: np.ndarray | bool) -> Outcome:
        row, clock = self.row, self.clock
        self.size = np.minimum(actions, self.length[row]) * live
        first = self.tables.first[row]
        asked = first < self.size
        rows = self.unread + first
        seconds = asked * self.forward[clock, np.where(asked, rows, 0)] + self.further[clock, row, self.size]
        self.unread *= ~asked
        self.read = asked * self.tables.read[row, self.size]
        return self._outcome(np.ones(len(actions), bool) & live, seconds)

    def _by_token(self, actions: np.ndarray, live: np.ndarray | bool) -> Outcome:
        row = self.row
        grows = (actions == 1) & (self.size < self.length[row]) & live
        asked = grows & ~(self.tables.chain[row, self.size, 4] > 0)
        rows = np.where(asked, self.unread + self.size - self.read, 0)
        self.read = np.where(asked, self.size, self.read)
        self.unread *= ~asked
        self.size = self.size + grows
        verified = (~grows | (self.size == self.k_max)) & live
        return self._outcome(verified, self.forward[self.clock, rows])

    def _outcome(self, verified: np.ndarray, seconds: np.ndarray) -> Outcome:
        accepted = np.minimum(self.right[self.row], self.size)
        self.before = self.row.copy()
        verify = verified * self.verification[self.clock, self.size + 1]
        return Outcome(verified, accepted, self.size, self.size, seconds, verify)

    def verified(
        self, which: np.ndarray, accepted: np.ndarray, emitted: np.ndarray, outcome: Outcome, finished: np.ndarray
    ) -> np.ndarray:
        """Chains that were judged: what is remembered of them, and what is left to read."""
        own, size, row = emitted[which], self.size[which], self.before[which]
        kept = np.minimum(np.minimum(self.read[which], own - 1), self.right[row])
        self.unread[which] += own - kept
        self.decided[which] = np.stack([accepted[which], size], 1)
        self.recent.push(which, self.decided[which].astype(np.int32))
        self.last[which] = self.tables.means[row, size]
        self.read[which] = self.size[which] = 0
        stale = self.row[which] >= self.kind_row[which] + FRESH
        self.kind_row[which] = np.where(stale, self.row[which], self.kind_row[which])
        return np.zeros(len(which))

    def observe(self, out: np.ndarray, which: np.ndarray | slice, alive: np.ndarray) -> None:
        """Fill in what is seen of the chains of ``which``."""
        slices, row = self.control.slices, self.row[which]
        if "free" in slices:
            chain = self.tables.chain
            seen = chain.reshape(-1, chain.shape[2]).take(row * chain.shape[1] + self.size[which], 0)
            seen[:, 4] *= alive
            out[:, : slices["free"].stop] = seen
        elif "confidence" in slices:
            out[:, :2] = self.last[which]
        if "match" in slices:
            out[:, slices["match"].start] = self.matched[row] * alive
        at, decided = slices["acceptance"].start, self.decided[which]
        for i, sums in enumerate(self.recent.sums):
            out[:, at + i] = sums[which, 0] / np.maximum(1, sums[which, 1])
        out[:, slices["last_k"].start] = decided[:, 1] / self.k_max
        out[:, slices["last_acceptance"].start] = decided[:, 0] / np.maximum(1, decided[:, 1])
        for name, size, index in (
            ("kind", len(KINDS), None if self.told is None else self.told[self.kind_row[which]]),
            ("task", len(TASKS) + 1, self.task[self.text_of[row]]),
        ):
            if name in slices:
                assert index is not None
                out[:, slices[name]] = np.eye(size, dtype=np.float32).take(index, 0)
        if self.costs is not None:
            out[:, slices["costs"]] = self.costs[self.clock[which]]
