"""The trees under way in many environments: acceptance, costs and observations are looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from spec_envs.decoding.clock import CostTable
from spec_envs.vector.cycles import CycleTable
from spec_envs.vector.draws import Draws
from spec_envs.vector.prices import costs_observed, prices


class Outcome(NamedTuple):
    """The outcome of a decision: arrays with one value per environment.

    Attributes:
        verified: True where the cycle ended; ``accepted``, ``drafted`` and ``sent`` have a meaning only there.
        accepted: tokens of the text among the verified nodes.
        drafted, sent: nodes drafted, and how many were verified.
        draft, verify: seconds of the drafter and of the target.
        details: what the control adds to the info of the step.
        beside: tokens among the accepted ones that are alternatives beside a chain.
    """

    verified: np.ndarray
    accepted: np.ndarray
    drafted: np.ndarray
    sent: np.ndarray
    draft: np.ndarray
    verify: np.ndarray
    details: Mapping[str, np.ndarray] = MappingProxyType({})
    beside: np.ndarray | int = 0


class Trees:
    """The trees under way in many environments.

    Args:
        cycles: the cycles of the control on the trace.
        tables: cost tables.
        count: number of environments.
        draws: generators of the environments.

    Attributes:
        row: row of the trace at which each environment is.
        depth: expansions of each tree.
        clock: index of the cost table that prices each environment's forwards.
        unread: tokens of each text that no forward of the drafter has read.
    """

    def __init__(self, cycles: CycleTable, tables: Sequence[CostTable], count: int, draws: Draws):
        self.cycles, self.plans, self.control, self.draws = cycles, cycles.plans, cycles.control, draws
        plans = self.plans
        self.shallowest, self.offered = int(plans.sizes[0]), plans.offered
        self.ended = plans.ended_by(int(self.control.action_space.n)) - self.shallowest * self.offered
        self.expansion = prices(tables, "draft", plans.width)[:, cycles.expansion]
        longest = cycles.trace.manifest.max_new_tokens  # all of them copied, and read by no forward so far
        unread = longest if cycles.copied.any() else self.control.max_depth + 2
        self.root = prices(tables, "draft", unread + int(cycles.first.max()))
        self.verification = prices(tables, "verify", int(cycles.nodes.max()) + 1)
        self.row, self.depth, self.unread = (np.zeros(count, np.int64) for _ in range(3))
        self.clock = np.zeros(count, np.int64)
        self.costs = costs_observed(tables, self.control)

    def start(self, which: np.ndarray) -> np.ndarray:
        """Draft the first trees of texts; return the seconds of drafting them."""
        self.unread[which] = 1
        return self.draft(which)

    def draft(self, which: np.ndarray) -> np.ndarray:
        """Draft what the first decision of a cycle needs; return its seconds, 0 for copies."""
        clock, row, made = self.clock[which], self.row[which], self.plans.made
        if made is None:
            depth = self.shallowest + self.draws.integers(which, len(self.cycles.sizes))
        else:
            depth = np.full(len(which), made)
        self.depth[which] = np.minimum(depth, self.cycles.deepest[row]) if self.plans.stepwise else depth
        asked = ~self.cycles.copied[row]
        seconds: np.ndarray = asked * (
            self.root[clock, self.unread[which] + self.cycles.first[row]] + depth * self.expansion[clock]
        )
        self.unread[which] *= ~asked
        return seconds

    def act(self, actions: np.ndarray, live: np.ndarray | bool = True) -> Outcome:
        """Carry out a decision of every environment that is ``live``."""
        plans = self.plans
        if not plans.stepwise:
            verified = np.ones(len(actions), bool) & live
            drafting = np.zeros(len(actions))
        else:
            grows = (actions == plans.drafts) & (self.depth < self.cycles.deepest[self.row])
            grows &= ~self.cycles.whole[self.row]
            verified = ~grows | (plans.runs_out & (self.depth + 1 == plans.deepest))
            grows, verified = grows & live, verified & live
            self.depth += grows
            drafting = grows * ~self.cycles.copied[self.row] * self.expansion[self.clock]
        plan = self.depth * self.offered + self.ended[actions]
        sent = self.cycles.nodes[self.row, plan]
        return Outcome(
            verified,
            self.cycles.accepted[self.row, plan],
            self.cycles.drafted[self.row, plan],
            sent,
            drafting,
            verified * self.verification[self.clock, sent + 1],
        )

    def verified(
        self, which: np.ndarray, accepted: np.ndarray, emitted: np.ndarray, finished: np.ndarray
    ) -> np.ndarray:
        """Draft the next trees of texts that continue; return the seconds of drafting them, 0 for texts that have
        ended."""
        continues = ~finished[which]
        seconds = np.zeros(len(which))
        self.unread[which] += emitted[which]
        seconds[continues] = self.draft(which[continues])
        return seconds

    def observe(self, out: np.ndarray, which: np.ndarray | slice, alive: np.ndarray) -> None:
        """Write the observations of the trees of ``which`` into ``out``; texts that have ended show no tree."""
        row, depth = self.row[which], self.depth[which]
        if self.control.observation == "ltd":  # as wide as a tree, too large to keep for every position
            found = self.cycles.read_entries(row, depth)
        else:
            observed = self.cycles.observed
            found = observed.reshape(-1, observed.shape[2]).take(
                row * observed.shape[1] + depth - self.shallowest, axis=0
            )
        if not alive.all():
            found[~alive] = 0.0
        out[:, : found.shape[1]] = found
        if self.costs is not None:
            out[:, self.control.slices["costs"]] = self.costs[self.clock[which]]
