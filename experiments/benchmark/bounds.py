"""What could be had on the texts of a trace: the best static setting, that of each task, and the clairvoyant optimum.

The text is the same whatever is played, so the most tokens per second are the least seconds. A policy that knew everything
would choose at every position the setting that leads to the least seconds to the text's end, found by dynamic programming
backwards over the positions; with all tokens fixed that is the optimum of ΣN/ΣT itself, and Dinkelbach's iteration is not
needed. Nobody can reach it: acceptance is not known before the target has spoken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spec_envs.controls.base import Control
from spec_envs.controls.k import KControl
from spec_envs.controls.plans import Plans
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.trace import Trace
from spec_envs.vector.chains import chain_tables
from spec_envs.vector.prices import prices
from spec_envs.vector.trees import accepted_table

UNREAD = 48  # most tokens that a draft model may have to catch up with; more are priced as these


@dataclass
class Bounds:
    """Settings of a control on the texts of a trace, under a cost table.

    Args:
        control: of trees or chains; one that decides by token has the settings of one that decides by cycle.
        texts: indices of the trace.
        max_new_tokens: most tokens of a text, the first one included.
    """

    trace: Trace
    control: Control
    table: CostTable
    texts: Sequence[int]
    max_new_tokens: int

    def __post_init__(self) -> None:
        self.plans = Plans(self.control)
        starts = self.trace.starts
        self.first = starts[list(self.texts)]
        self.last = np.minimum(starts[np.array(self.texts) + 1], self.first + self.max_new_tokens) - 1
        self.tokens = self.last - self.first
        self.tasks = [self.trace.texts[i].task for i in self.texts]
        self.chain = isinstance(self.control, KControl)
        plans = self.plans
        if self.chain:
            k_max = self.control.k_max  # type: ignore[attr-defined]
            tables = chain_tables(self.trace, k_max)
            self.length = np.minimum(self.trace.columns["length"], k_max).astype(np.int64)
            self.right = np.minimum(self.trace.columns["right"], self.length).astype(np.int64)
            self.asked, self.read = tables.first, tables.read.astype(np.int64)
            self.draft = prices([self.table], "draft", UNREAD + k_max + 1)[0]
            further = self.draft[tables.gaps].cumsum(1)
            self.further = np.concatenate([np.zeros((len(further), 1)), further], 1)
            self.verify = prices([self.table], "verify", k_max + 1)[0]
        else:
            depth = self.control.max_depth  # type: ignore[attr-defined]
            budgets = np.unique(plans.budgets)
            offered = [self.control.budget] if hasattr(self.control, "budget") else self.control.budgets  # type: ignore[attr-defined]
            table = accepted_table(self.trace, [offered[b] for b in budgets], depth)
            self.accepted = table[:, plans.sizes, plans.budgets].astype(np.int64)  # [rows, plans]
            self.root = prices([self.table], "draft", depth + 2)[0]
            self.cycle = plans.sizes * plans.forward(self.table) + plans.verification(self.table)
        self.playable = np.ones(len(plans.sizes), bool)
        if not self.chain and self.control.name == "depth":
            self.playable = plans.sizes >= 1  # the first expansion is always made

    def names(self) -> list[tuple[int, ...]]:
        """Every setting: k, or depth and budget."""
        if self.chain:
            return [(int(k),) for k in self.plans.sizes]
        offered = [self.control.budget] if hasattr(self.control, "budget") else self.control.budgets  # type: ignore[attr-defined]
        return [(int(d), offered[b]) for d, b in zip(self.plans.sizes, self.plans.budgets, strict=True)]

    def static(self) -> np.ndarray:
        """Seconds of every text under every setting, ``[texts, plans]``; infinite where the control does not offer it."""
        texts, count = len(self.texts), len(self.plans.sizes)
        row = np.repeat(self.first[:, None], count, 1)
        last = np.repeat(self.last[:, None], count, 1)
        plan = np.broadcast_to(np.arange(count), (texts, count))
        seconds, unread = np.zeros((texts, count)), np.ones((texts, count), np.int64)
        while (alive := row < last).any():
            spent, emitted, unread_after = self._cycles(row, plan, unread, last - row)
            seconds += alive * spent
            unread = np.where(alive, unread_after, unread)
            row = row + alive * emitted
        return np.where(self.playable, seconds, np.inf)

    def clairvoyant(self) -> np.ndarray:
        """The least seconds of every text, ``[texts]``."""
        found = []
        count = len(self.plans.sizes)
        states = UNREAD + 1 if self.chain else int(self.root.size)
        unread = np.repeat(np.arange(states)[:, None], count, 1)
        plan = np.broadcast_to(np.arange(count), unread.shape)
        for first, last in zip(self.first.tolist(), self.last.tolist(), strict=True):
            least = np.zeros((last - first + 1, states))  # of the rest of the text, by position and tokens unread
            for row in range(last - 1, first - 1, -1):
                at = np.full_like(plan, row)
                spent, emitted, after = self._cycles(at, plan, unread, last - at)
                total = spent + least[row - first + emitted, np.minimum(after, states - 1)]
                least[row - first] = np.where(self.playable, total, np.inf).min(1)
            found.append(least[0, 1])
        return np.array(found)

    def _cycles(
        self, row: np.ndarray, plan: np.ndarray, unread: np.ndarray, left: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Seconds, emitted tokens, and tokens that are then unread, of cycles at those rows."""
        if not self.chain:
            accepted = self.accepted[row, plan]
            emitted = np.clip(np.minimum(accepted + 1, left), 1, None)
            return self.root[np.minimum(unread, self.root.size - 1)] + self.cycle[plan], emitted, emitted
        size = np.minimum(self.plans.sizes[plan], self.length[row])
        asked = self.asked[row] < size
        waiting = np.minimum(unread, UNREAD)
        draft = (
            np.where(asked, self.draft[np.where(asked, waiting + self.asked[row], 0)], 0.0) + self.further[row, size]
        )
        accepted = np.minimum(self.right[row], size)
        emitted = np.clip(np.minimum(accepted + 1, left), 1, None)
        read = np.where(asked, self.read[row, size], 0)
        kept = np.minimum(np.minimum(read, emitted - 1), self.right[row])
        return draft + self.verify[size + 1], emitted, np.where(asked, 0, waiting) + emitted - kept

    def throughput(self, seconds: np.ndarray) -> np.ndarray:
        """Tokens per second of seconds by text ``[texts, …]``."""
        return self.tokens.sum() / seconds.sum(0)

    def best(self, seconds: np.ndarray) -> int:
        """The fastest setting over all texts."""
        return int(seconds.sum(0).argmin())

    def best_by_task(self, seconds: np.ndarray) -> dict[str, int]:
        """The fastest setting of each task."""
        tasks = np.array(self.tasks)
        return {task: int(seconds[tasks == task].sum(0).argmin()) for task in dict.fromkeys(self.tasks)}
