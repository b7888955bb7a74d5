"""One setting for every cycle: the static baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spec_envs.controls.base import Control
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import EXPAND, VERIFY, DepthControl
from spec_envs.controls.k import KControl


class FixedAgent:
    """Plays one depth (``SpecDepth-v0``), one budget (``SpecBudget-v0``) or one chain length.

    Args:
        control: the problem.
        value: the depth, the number of nodes, or the length.

    Raises:
        ValueError: a value that the control does not offer.
    """

    decision_seconds = 0.0

    def __init__(self, control: Control, value: int, seed: int = 0):
        self.control, self.value = control, value
        if value not in settings(control):
            raise ValueError(f"value is {value}; expected one of {', '.join(map(str, settings(control)))}")

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        if isinstance(self.control, BudgetControl):
            return self.control.budgets.index(self.value), state
        if isinstance(self.control, KControl):
            return self.value, state
        return (EXPAND if self._expansions(observation) < self.value else VERIFY), state

    def _expansions(self, observation: np.ndarray) -> int:
        slices = self.control.slices
        if "expansions" in slices:
            return round(float(observation[slices["expansions"]][0]) * self.control.max_depth)
        return round(float(observation[slices["depth"]][0]) * 10)

    def learn(self, total_timesteps: int) -> FixedAgent:
        """Nothing to learn."""
        return self

    def save(self, folder: Path) -> None:
        """Nothing to save: the value is in the run's config."""

    def load(self, folder: Path) -> None:
        """Nothing to load."""


def settings(control: Control) -> tuple[int, ...]:
    """Every static setting of a control."""
    if isinstance(control, BudgetControl):
        return control.budgets
    if isinstance(control, KControl):
        return tuple(range(control.k_max + 1))
    assert isinstance(control, DepthControl)
    return tuple(range(1, control.max_depth + 1))
