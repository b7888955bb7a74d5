"""Upper bounds on the texts of a trace: the best static setting, the best one of each task, and the clairvoyant
optimum.

The text is the same under every policy, so the highest throughput is the fewest seconds. A policy that knew everything
would choose at every position the setting with the fewest seconds to the end of the text. Dynamic programming finds it,
backwards over the positions. As the number of tokens is fixed, this is the optimum of ΣN/ΣT, and Dinkelbach's iteration
is not needed. No policy can reach it, because acceptance is not known before the target has verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import numpy as np
import torch

from spec_envs.controls.base import Control
from spec_envs.decoding import catch_up
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.drafters.lookup import LookupDrafter
from spec_envs.decoding.traces.trace import Trace
from spec_envs.vector.cycles import CycleTable
from spec_envs.vector.prices import prices

UNREAD = 48  # most tokens that a draft model catches up with; more tokens are priced as this many


@dataclass
class Bounds:
    """The bounds for the static settings of a control, on texts of a trace and under a cost table.

    Args:
        control: a control of trees or chains; if it decides by token, it has the settings of one that decides by cycle.
        texts: indices of the trace.
        max_new_tokens: most tokens of a text, the first one included.
    """

    trace: Trace
    control: Control
    table: CostTable
    texts: Sequence[int]
    max_new_tokens: int

    def __post_init__(self) -> None:
        cycles = CycleTable(self.trace, self.control)
        self.plans = plans = cycles.plans.settled()
        starts = self.trace.starts
        self.first = starts[list(self.texts)]
        self.last = np.minimum(starts[np.array(self.texts) + 1], self.first + self.max_new_tokens) - 1
        self.tokens = self.last - self.first
        self.tasks = [self.trace.texts[i].task for i in self.texts]
        self.offered = plans.sizes >= plans.first
        self.most = UNREAD if plans.chain or cycles.copied.any() else plans.deepest + 2
        self.draft = prices(
            [self.table], "draft", max(self.most + max(plans.deepest, int(cycles.first.max())), plans.width) + 1
        )[0]
        verify = prices([self.table], "verify", int(cycles.nodes.max()) + 1)[0]
        self.accepted = cycles.accepted.astype(np.int64)
        rows, shape = self.trace.rows, self.accepted.shape
        self.further = np.broadcast_to(cycles.later(self.draft[None])[0], shape)
        self.verify = np.broadcast_to(verify[cycles.nodes + 1], shape)
        self.asked, self.read = np.broadcast_to(cycles.asked, shape), np.broadcast_to(cycles.read, shape)
        self.begins_with_copy = cycles.copied.reshape(rows, -1)[:, 0]
        self.copied, self.right = np.broadcast_to(cycles.first, rows), np.broadcast_to(cycles.right, rows)

    def static(self) -> np.ndarray:
        """Return the seconds of every text under every plan, ``[texts, plans]``; infinite for plans that the control
        does not offer."""
        every = np.arange(len(self.plans.sizes))
        return np.where(self.offered, self._repeated(every, every), np.inf)

    def by_copies(self) -> np.ndarray:
        """Return the seconds of every text under every two lengths of chains, ``[texts, k, k]``: one length for cycles
        whose first token is not a copy, and one for those whose first token is."""
        count = len(self.plans.sizes)
        plan, copied = np.divmod(np.arange(count * count), count)
        return self._repeated(plan, copied).reshape(len(self.texts), count, count)

    def by_lookup(self) -> np.ndarray:
        """Return the seconds of every text under prompt lookup alone (the drafter ``lookup``), ``[texts, k]``, for chains
        of 0 tokens to as many as the control drafts. A cycle in which nothing can be copied is a plain step."""
        copied, right = self._looked_up
        k = np.arange(self.control.max_depth + 2)
        verify = prices([self.table], "verify", len(k))[0]
        row, last = (np.repeat(rows[:, None], len(k), 1) for rows in (self.first, self.last))
        seconds = np.zeros(row.shape)
        while (alive := row < last).any():
            seconds += alive * verify[np.minimum(copied[row], k) + 1]
            row = row + np.minimum(np.minimum(right[row], k) + 1, last - row)
        return seconds

    @cached_property
    def _looked_up(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that prompt lookup copies at most at every row of the trace, and how many of the first ones are the
        text's; 0 for other texts.

        The drafter copies them anew, because a trace of ``lookup+MODEL`` has other copies: those after two or more
        matching tokens, of up to four that are looked up at once, and where a place reaches the end of the text they go
        on at another. Prompt lookup alone copies after one matching token, too, looks up three, and ends there.
        """
        drafter = LookupDrafter(self.trace.manifest.vocab, self.trace.manifest.context)
        tokens, rng = self.trace.columns["tokens"], np.random.default_rng()
        copied, right = np.zeros((2, self.trace.rows), np.int64)
        for i, first, last in zip(self.texts, self.first.tolist(), self.last.tolist(), strict=True):
            drafter.start([*self.trace.texts[i].prompt, int(tokens[first])], 0, torch.empty(0), rng)
            answer = tokens[first : self.trace.starts[i + 1]].tolist()
            for at in range(last - first):
                chain, ahead = drafter.ahead(self.control.max_depth + 1), answer[at + 1 :]
                same = (ours == theirs for ours, theirs in zip(chain, ahead, strict=False))
                copied[first + at], right[first + at] = len(chain), sum(takewhile(bool, same))
                drafter.commit(ahead[:1], torch.empty(0))
        return copied, right

    def _repeated(self, plan: np.ndarray, copied: np.ndarray) -> np.ndarray:
        """Return the seconds ``[texts, n]`` of every text under plans ``[n]`` that all its cycles follow, except that
        cycles which begin with a copy follow the plans ``copied``."""
        shape = len(self.texts), len(plan)
        row, last = (np.repeat(rows[:, None], len(plan), 1) for rows in (self.first, self.last))
        seconds, unread = np.zeros(shape), np.ones(shape, np.int64)
        while (alive := row < last).any():
            followed = np.where(self.begins_with_copy[row], copied, plan)
            spent, emitted, unread_after = self._cycles(row, followed, unread, last - row)
            seconds += alive * spent
            unread = np.where(alive, unread_after, unread)
            row = row + alive * emitted
        return seconds

    def clairvoyant(self) -> np.ndarray:
        """Return the fewest seconds of every text, ``[texts]``."""
        found = []
        count = len(self.plans.sizes)
        states = self.most + 1
        unread = np.repeat(np.arange(states)[:, None], count, 1)
        plan = np.broadcast_to(np.arange(count), unread.shape)
        for first, last in zip(self.first.tolist(), self.last.tolist(), strict=True):
            least = np.zeros(
                (last - first + 1, states)
            )  # seconds to the end of the text, by position and unread tokens
            for row in range(last - 1, first - 1, -1):
                at = np.full_like(plan, row)
                spent, emitted, after = self._cycles(at, plan, unread, last - at)
                total = spent + least[row - first + emitted, np.minimum(after, states - 1)]
                least[row - first] = np.where(self.offered, total, np.inf).min(1)
            found.append(least[0, 1])
        return np.array(found)

    def _cycles(
        self, row: np.ndarray, plan: np.ndarray, unread: np.ndarray, left: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the seconds of cycles at rows of the trace, the tokens that they emit, and the tokens that the draft
        model has not read after them.

        Args:
            row, plan: where and how each cycle drafts.
            unread: tokens that the draft model has not read before it.
            left: tokens to the end of the text.
        """
        asked, waiting = self.asked[row, plan], np.minimum(unread, self.most)
        rows = np.where(asked, catch_up.rows(waiting, self.copied[row]), 0)
        seconds = self.draft[rows] + self.further[row, plan] + self.verify[row, plan]
        emitted = np.clip(np.minimum(self.accepted[row, plan] + 1, left), 1, None)
        waiting = np.where(asked, 0, waiting)
        return seconds, emitted, catch_up.left_unread(waiting, self.read[row, plan], emitted, self.right[row])

    def throughput(self, seconds: np.ndarray) -> np.ndarray:
        """Return the tokens per second over all texts, of seconds by text ``[texts, …]``: ``[…]``."""
        rates: np.ndarray = self.tokens.sum() / seconds.sum(0)
        return rates

    def best(self, seconds: np.ndarray) -> int:
        """Return the index of the plan that is fastest over all texts."""
        return int(seconds.sum(0).argmin())

    def best_by_task(self, seconds: np.ndarray) -> dict[str, int]:
        """Return the index of the plan that is fastest for each task."""
        tasks = np.array(self.tasks)
        return {task: int(seconds[tasks == task].sum(0).argmin()) for task in dict.fromkeys(self.tasks)}
