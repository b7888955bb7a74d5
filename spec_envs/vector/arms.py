"""The table of every cycle that one of several drafters can begin at a position of their traces."""

from __future__ import annotations

import numpy as np

from spec_envs.controls.drafter import DrafterControl
from spec_envs.controls.plans import Plans, chain_plans
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.decoding.traces.trace import Trace
from spec_envs.vector.cycles import CycleTable


class Drafting:
    """The cycles of one drafter.

    Attributes:
        name: of the drafter.
        free: True if it has no weights, so that it makes no forwards.
        trees: True if it drafts trees.
        cycles: the cycles of its trace; of chains of every length, or of the trees that are offered.
        plans: ``[sizes]``, the plan of ``cycles`` for each size.
        right, length: ``[rows]``, of a chain of the largest size the first tokens that are the text's, and all tokens.
    """

    def __init__(self, name: str, trace: Trace, control: DrafterControl):
        self.name, self.free = name, not DrafterName.parse(name).model
        sizes, depths = np.array(control.sizes), np.array(control.depths)
        self.trees = trace.kind == "tree" and control.width > 1
        if trace.kind == "tree":
            depths = depths if self.trees else sizes - 1
            nodes = control.width + control.width**2 * depths
            plans = Plans(depths, sizes, nodes, np.arange(len(sizes)), width=control.width)
            self.cycles, self.plans = CycleTable(trace, control, plans), np.arange(len(sizes))
        else:
            self.cycles, self.plans = CycleTable(trace, control, chain_plans(int(sizes[-1]))), sizes
        largest = self.plans[-1]
        self.right, self.length = self.cycles.accepted[:, largest], self.cycles.nodes[:, largest]


class ArmTable:
    """The cycles of a control that chooses between drafters, by row of the traces and action of the control.

    Args:
        trace: traces of the control's drafters.
        control: the control.

    Attributes:
        drafters: the cycles of each drafter.
        accepted, nodes: ``[rows, actions]``, tokens of the text among the verified nodes, and how many are verified.
        drafted: ``[rows, actions]``, nodes drafted.
        forwards: ``[1, actions]``, 0, because drafters differ in what a forward costs.
        further, beside: ``[1, actions]``, 0, because no alternatives are verified beside chains.
    """

    def __init__(self, trace: PortfolioTrace, control: DrafterControl):
        self.trace, self.control = trace, control
        self.drafters = [Drafting(name, one, control) for name, one in trace.traces.items()]
        shape = (trace.rows, 1 + control.arms)
        self.accepted, self.nodes, self.drafted = (np.zeros(shape, np.int16) for _ in range(3))
        sizes = len(control.sizes)
        for i, drafter in enumerate(self.drafters):
            own = slice(1 + i * sizes, 1 + (i + 1) * sizes)
            for name in ("accepted", "nodes", "drafted"):
                getattr(self, name)[:, own] = getattr(drafter.cycles, name)[:, drafter.plans]
        self.forwards = self.further = self.beside = np.zeros((1, shape[1]), np.int64)
