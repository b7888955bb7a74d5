"""Sums over the last few cycles of many environments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Recent:
    """Sums of some numbers over the last cycles of each environment.

    Args:
        windows: numbers of cycles to sum over, ascending.
        count: number of environments.
        numbers: number of values that a cycle has.

    Attributes:
        sums: ``[windows, count, numbers]``.
        cycles: ``[count]``, cycles so far.
    """

    def __init__(self, windows: Sequence[int], count: int, numbers: int):
        self.windows = windows
        # all places of an environment, then those of the next one
        self.ring = np.zeros((count * windows[-1], numbers), np.int32)
        self.sums = np.zeros((len(windows), count, numbers), np.int32)
        self.cycles = np.zeros(count, np.int64)

    def clear(self, which: np.ndarray) -> None:
        """Forget the cycles of these environments."""
        self.ring.reshape(len(self.cycles), -1)[which] = 0
        self.sums[:, which] = 0
        self.cycles[which] = 0

    def push(self, which: np.ndarray, values: np.ndarray) -> None:
        """Add the cycle with ``values`` ``[len(which), numbers]`` that ended in each of these environments."""
        at, longest = self.cycles[which], self.windows[-1]
        first = which * longest
        for window, sums in zip(self.windows, self.sums, strict=True):
            sums[which] += values - self.ring.take(first + (at - window) % longest, 0)
        self.ring[first + at % longest] = values
        self.cycles[which] = at + 1
