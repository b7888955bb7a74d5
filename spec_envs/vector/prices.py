"""Cost tables as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spec_envs.decoding.clock import CostTable


def prices(tables: Sequence[CostTable], part: str, rows: int) -> np.ndarray:
    """Seconds of forwards of 0…``rows`` rows under each table, ``[tables, rows + 1]``."""
    return np.array([[table.seconds(part, n) for n in range(rows + 1)] for table in tables])
