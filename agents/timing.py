"""What a decision costs."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

REPEATS = 20
CACHE = 16 << 20  # bytes, more than a core has for itself


def cold_seconds(decide: Callable[[], object]) -> float:
    """Median seconds of a decision such as it is between forwards of a model, which leave little of it in the caches: two to
    three times those of one that is repeated in a loop."""
    weights, timings = np.zeros(CACHE // 8), []
    for _ in range(REPEATS):
        weights += 1
        begin = time.perf_counter()
        decide()
        timings.append(time.perf_counter() - begin)
    return float(np.median(timings))
