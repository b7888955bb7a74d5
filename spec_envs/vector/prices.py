"""Cost tables as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spec_envs.controls.base import Control, costs_shown
from spec_envs.decoding.clock import CostTable


def prices(tables: Sequence[CostTable], part: str, rows: int) -> np.ndarray:
    """Return the seconds of forwards of 0…``rows`` rows under each table, ``[tables, rows + 1]``."""
    return np.array([[table.seconds(part, n) for n in range(rows + 1)] for table in tables])


def costs_observed(tables: Sequence[CostTable], control: Control) -> np.ndarray | None:
    """Return each table as a control's ``cost_features`` show it, ``[tables, size]``; None without cost features."""
    if not control.cost_features:
        return None
    shown = [costs_shown(table, control.width) for table in tables]
    return np.clip(np.array(shown, np.float32), 0.0, 1.0)
