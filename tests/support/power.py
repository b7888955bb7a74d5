"""The sample size that a test of a distribution needs."""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2, ncx2


def draws_for_power(expected: np.ndarray, bias: float, power: float) -> int:
    """Return the number of draws at which a χ² test at level 0.001 detects a total variation of ``bias`` with this
    power. The hardest bias to detect moves mass between the two largest bins."""
    largest = np.sort(expected)[-2:]
    per_draw = bias**2 * (1 / largest).sum()
    critical = chi2.isf(0.001, len(expected) - 1)
    draws = 1000
    while ncx2.sf(critical, len(expected) - 1, draws * per_draw) < power:
        draws = int(draws * 1.1)
    return draws
