"""One setting for every cycle: the static baseline."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.rules.base import Rule
from spec_envs.controls.base import Control
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.dvi import DVIControl
from spec_envs.controls.k import KControl
from spec_envs.controls.topk import TopKControl
from spec_envs.controls.tree import EXPAND, TreeControl


class FixedAgent(Rule):
    """Plays one depth (``SpecDepth-v0``), one budget (``SpecBudget-v0``), one of both (``SpecTree-v0``), one chain length
    (``SpecK-v0``) or one choice of what to send (``SpecTopK-v0``).

    Args:
        control: the problem.
        value: the depth, the number of nodes, both (``"2x7"``; YAML wants quotes around ``"0x7"``, which is a number to it),
            the length, or the choice by its name (``"4x300"``, ``"cloud 64"``).

    Raises:
        ValueError: a value that the control does not offer.
    """

    def __init__(self, control: Control, value: int | str, seed: int = 0):
        super().__init__(control)
        self.value = value
        if value not in settings(control):
            offered = (
                ", ".join(map(str, settings(control))) or "none: its actions are tokens, which are never all alike"
            )
            if isinstance(control, TreeControl):
                budgets = ", ".join(map(str, control.budgets))
                offered = f"DEPTHxBUDGET with depths 0 to {control.max_depth} and budgets {budgets}"
            raise ValueError(f"value is {value}; expected one of {offered}")
        most = {"drafted": getattr(control, "k_max", 0), "expansions": control.max_depth, "depth": 10}
        self.grown, self.most = next(((name, n) for name, n in most.items() if name in control.slices), ("", 0))
        self.looks_at = (self.grown,) if self.grown else ()
        stepwise = isinstance(control, KControl) and control.decision == "token"
        if stepwise and "drafted" not in control.slices:
            raise ValueError(
                f"a fixed length looks at drafted, which observation={control.observation!r} does not show"
            )

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        control = self.control
        if isinstance(control, (BudgetControl, TopKControl)):
            return settings(control).index(self.value), state
        if isinstance(control, KControl) and control.decision == "cycle":
            return self.value, state
        if isinstance(control, TreeControl):
            depth, budget = map(int, str(self.value).split("x"))
            return EXPAND if self._grown(observation) < depth else 1 + control.budgets.index(budget), state
        assert isinstance(self.value, int)
        return int(self._grown(observation) < self.value), state  # one level or token more, or verify

    def _grown(self, observation: np.ndarray) -> int:
        """Levels or tokens drafted so far."""
        return round(self.read(observation, self.grown) * self.most)


def settings(control: Control) -> tuple[int, ...] | tuple[str, ...]:
    """Every static setting of a control; of one whose actions are tokens, none."""
    if isinstance(control, DVIControl):
        return ()
    if isinstance(control, TopKControl):
        return tuple(map(str, control.choices))
    if isinstance(control, BudgetControl):
        return control.budgets
    if isinstance(control, TreeControl):
        return tuple(f"{depth}x{budget}" for depth in range(control.max_depth + 1) for budget in control.budgets)
    if isinstance(control, KControl):
        return tuple(range(control.k_max + 1))
    assert isinstance(control, DepthControl)
    return tuple(range(1, control.max_depth + 1))
