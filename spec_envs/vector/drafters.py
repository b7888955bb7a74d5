"""Cycles of several drafters in many environments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spec_envs.controls.drafter import LAG_UNIT, NEUTRAL, RATE
from spec_envs.controls.observation.text_kind import FRESH, KINDS
from spec_envs.decoding import catch_up
from spec_envs.decoding.clock import DRAFTER, CostTable
from spec_envs.decoding.drafters.lookup import LONGEST
from spec_envs.vector.arms import ArmTable
from spec_envs.vector.chains import kinds
from spec_envs.vector.draws import Draws
from spec_envs.vector.prices import costs_observed, prices
from spec_envs.vector.trees import Outcome

NOBODY = -1


class Drafters:
    """The drafters of many environments, and what is known about them.

    Args:
        cycles: the cycles of the control on its traces.
        tables: cost tables.
        count: number of environments.
        draws: generators of the environments; nothing is drawn from them, because nothing is drafted before an action.

    Attributes:
        row: row of the traces at which each environment is.
        clock: index of the cost table that prices each environment's forwards.
        unread: ``[count, drafters]``, tokens of each text that no forward of a drafter has read.
        survival, right: what the control of a single environment has under these names, ``[count, drafters, sizes]``
            and ``[count, drafters]``; −1 where the right tokens are not known.
    """

    def __init__(self, cycles: ArmTable, tables: Sequence[CostTable], count: int, draws: Draws):
        self.cycles, self.control, self.drafters = cycles, cycles.control, cycles.drafters
        trace, several = cycles.trace, len(cycles.drafters)
        self.sizes, self.depths = np.array(self.control.sizes), np.array(self.control.depths)
        largest = int(self.sizes[-1])
        longest = trace.manifest.max_new_tokens + largest + 1  # all of them unread so far
        self.names = np.array([*self.control.drafters, ""], object)  # the last one is nobody's
        named = [f"{DRAFTER}{drafter.name}" for drafter in self.drafters]
        blocks = max(int(drafter.cycles.first.max()) for drafter in self.drafters)
        self.forward = [prices(tables, name, max(longest + blocks, self.control.width)) for name in named]
        self.further = [
            None if drafter.trees else drafter.cycles.later(forward)
            for drafter, forward in zip(self.drafters, self.forward, strict=True)
        ]
        self.verification = prices(tables, "verify", largest + 1)
        self.matched = [
            np.minimum(1.0, np.asarray(one.columns["matched"]) / LONGEST).astype(np.float32)
            for name, one in trace.traces.items()
            if name in self.control.copiers
        ]
        self.kinds = kinds(trace)
        self.row, self.clock, self.kind_row = (np.zeros(count, np.int64) for _ in range(3))
        self.before = np.zeros(count, np.int64)
        self.unread, self.read = (np.zeros((count, several), np.int64) for _ in range(2))
        self.survival = np.full((count, several, len(self.sizes)), NEUTRAL)
        self.right = np.full((count, several), NOBODY)
        self.last = np.full(count, NOBODY)
        self.last_accepted = np.zeros(count, np.int64)
        self.costs = costs_observed(tables, self.control)

    def start(self, which: np.ndarray) -> np.ndarray:
        """Begin texts; return 0 seconds, since nothing is drafted before the first decision."""
        self.unread[which], self.read[which] = 1, 0
        self.survival[which], self.right[which] = NEUTRAL, NOBODY
        self.last[which], self.last_accepted[which] = NOBODY, 0
        self.kind_row[which] = self.row[which]
        return np.zeros(len(which))

    def act(self, actions: np.ndarray, live: np.ndarray | bool = True) -> Outcome:
        """Carry out the decision of every environment that is ``live``."""
        count = len(actions)
        going = np.ones(count, bool) & live
        self.before = self.row.copy()
        self.last = np.where(going, actions, self.last)
        self.read[going] = 0
        seconds = np.zeros(count)
        for i in range(len(self.drafters)):
            which = np.flatnonzero(going & (self._asked(actions) == i))
            seconds[which] = self._drafted(i, which, (actions[which] - 1) % len(self.sizes))
        cycles, row = self.cycles, self.row
        sent = cycles.nodes[row, actions].astype(np.int64)
        verify = going * self.verification[self.clock, sent + 1]
        accepted = cycles.accepted[row, actions].astype(np.int64)
        named = np.where(going, self.names[self._asked(actions)], "")
        drafted = cycles.drafted[row, actions].astype(np.int64)
        return Outcome(going, accepted, drafted, sent, seconds, verify, {"drafter": named})

    def _asked(self, actions: np.ndarray) -> np.ndarray:
        """Return the number of the drafter that each action asks, or ``NOBODY``."""
        asked: np.ndarray = (actions - 1) // len(self.sizes)  # −1 for action 0
        return asked

    def _drafted(self, i: int, which: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Let drafter ``i`` draft in environments ``which``; return the seconds."""
        drafter, forward, priced = self.drafters[i], self.forward[i], self.further[i]
        clock, row, unread = self.clock[which], self.row[which], self.unread[which, i]
        if priced is None:
            reads = ~drafter.cycles.copied[row]
            self.unread[which, i] *= ~reads
            further = self.depths[size] * forward[clock, drafter.cycles.expansion]
            seconds: np.ndarray = reads * (forward[clock, unread + drafter.cycles.first[row]] + further)
            return seconds
        plan, cycles = drafter.plans[size], drafter.cycles
        first, asked = cycles.first[row], cycles.asked[row, plan]
        needed = np.where(asked, catch_up.rows(unread, first), 0)
        self.unread[which, i] *= ~asked
        self.read[which, i] = cycles.read[row, plan]
        found: np.ndarray = asked * forward[clock, needed] + priced[clock, row, plan]
        return found

    def verified(
        self, which: np.ndarray, accepted: np.ndarray, emitted: np.ndarray, finished: np.ndarray
    ) -> np.ndarray:
        """Note what the cycles of ``which`` have shown; return 0 seconds, since nothing is drafted before the next
        decision."""
        row, action = self.before[which], self.last[which]
        emitted, accepted = emitted[which], accepted[which]
        asked, size = self._asked(action), (action - 1) % len(self.sizes)
        self.right[which] = NOBODY
        for i, drafter in enumerate(self.drafters):
            right = drafter.right[row].astype(np.int64)
            self.unread[which, i] = catch_up.left_unread(self.unread[which, i], self.read[which, i], emitted, right)
            mine = asked == i
            if drafter.free:
                shown = np.minimum(right, emitted)
                self._learn(which, i, shown, (shown < emitted) | (shown == drafter.length[row]))
            elif drafter.trees:
                self.right[which[mine], i] = accepted[mine]
                self._move(which[mine], i, size[mine], accepted[mine])
            elif mine.any():
                sent = self.cycles.nodes[row, action].astype(np.int64)
                rejected = (accepted < sent) | (sent < self.sizes[size])
                self._learn(which[mine], i, accepted[mine], rejected[mine])
        self.last_accepted[which] = accepted
        stale = self.row[which] >= self.kind_row[which] + FRESH
        self.kind_row[which] = np.where(stale, self.row[which], self.kind_row[which])
        return np.zeros(len(which))

    def _learn(self, which: np.ndarray, i: int, right: np.ndarray, known: np.ndarray) -> None:
        """Note how many of the first tokens of chains were right; see ``DrafterControl``."""
        self.right[which, i] = right
        for j, size in enumerate(self.sizes.tolist()):
            told = known | (right >= size)
            self._move(which[told], i, np.full(int(told.sum()), j), np.minimum(right[told], size))

    def _move(self, which: np.ndarray, i: int, size: np.ndarray, accepted: np.ndarray) -> None:
        """Move the means of a drafter at these sizes towards its accepted tokens."""
        before = self.survival[which, i, size]
        self.survival[which, i, size] = before + RATE * (accepted / self.sizes[size] - before)

    def observe(self, out: np.ndarray, which: np.ndarray | slice, alive: np.ndarray) -> None:
        """Write the observations of ``which`` into ``out``; texts that have ended show no match and no lag."""
        slices, row, largest = self.control.slices, self.row[which], self.sizes[-1]
        if "match" in slices:
            out[:, slices["match"]] = np.stack([matched[row] for matched in self.matched], 1) * alive[:, None]
        out[:, slices["survival"]] = self.survival[which].reshape(len(row), -1)
        right = self.right[which]
        out[:, slices["scores"]] = np.minimum(1.0, np.maximum(0, right) / largest)
        out[:, slices["known"]] = right != NOBODY
        reads = np.array([not drafter.free for drafter in self.drafters])
        out[:, slices["lag"]] = np.minimum(1.0, self.unread[which] / LAG_UNIT) * reads * alive[:, None]
        last = self.last[which]
        out[:, slices["last"]] = last[:, None] == np.arange(slices["last"].stop - slices["last"].start)
        out[:, slices["last_accepted"].start] = self.last_accepted[which] / largest
        out[:, slices["kind"]] = np.eye(len(KINDS), dtype=np.float32).take(self.kinds[self.kind_row[which]], 0)
        if self.costs is not None:
            out[:, slices["costs"]] = self.costs[self.clock[which]]
