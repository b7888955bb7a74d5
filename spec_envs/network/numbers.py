"""Numbers that people give to commands: in their range, or one sentence about it."""

from __future__ import annotations

import math

MOST = 2**31 - 1


def check_count(name: str, value: int, low: int = 1, high: int = MOST) -> None:
    """Refuse a whole number out of range.

    Raises:
        ValueError: it is below ``low`` or above ``high``.
    """
    if not low <= value <= high:
        expected = f"{low} or more" if high == MOST and value < low else f"{low} to {high}"
        raise ValueError(f"{name} is {value}; expected {expected}")


def check_number(name: str, value: float, low: float, high: float = 1e9) -> None:
    """Refuse a number out of range, or that is none.

    Raises:
        ValueError: it is below ``low``, above ``high`` or not finite.
    """
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} is {value:g}; expected a number from {low:g} to {high:g}")
