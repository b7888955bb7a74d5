"""Formulas over the path probabilities of trees, which live and recorded observations share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def survival(scores: np.ndarray, level_starts: Sequence[int]) -> np.ndarray:
    """Return the summed path probability of each level of trees, ``[…, levels]``.

    Args:
        scores: path log-probabilities ``[…, nodes]``.
        level_starts: the first node of each level.
    """
    sums: np.ndarray = np.add.reduceat(np.exp(scores), level_starts, -1)
    return sums


def gains(scores: np.ndarray, budgets: np.ndarray, max_depth: int) -> np.ndarray:
    """Return the expected accepted tokens that each budget adds to the one before, by the drafter's own probabilities,
    in units of the deepest path, ``[…, budgets]``.

    Args:
        scores: path log-probabilities ``[…, nodes]``, −inf for missing nodes.
    """
    reached = np.zeros((*scores.shape[:-1], scores.shape[-1] + 1))
    reached[..., 1:] = np.exp(-np.sort(-scores, -1)).cumsum(-1)
    at: np.ndarray = reached[..., np.minimum(budgets, scores.shape[-1])]
    added = at.copy()
    added[..., 1:] -= at[..., :-1]
    added /= max_depth + 1
    return added
