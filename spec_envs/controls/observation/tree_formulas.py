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


def gains(scores: np.ndarray, budgets: Sequence[int], max_depth: int) -> np.ndarray:
    """Return the expected accepted tokens that each budget adds to the one before, by the drafter's own probabilities,
    in units of the deepest path, ``[…, budgets]``.

    Args:
        scores: path log-probabilities ``[…, nodes]``, −inf for missing nodes.
    """
    best = np.exp(-np.sort(-scores, -1)).cumsum(-1)
    reached = np.concatenate([np.zeros((*best.shape[:-1], 1)), best], -1)
    added: np.ndarray = np.diff(reached[..., np.minimum(budgets, scores.shape[-1])], prepend=0.0) / (max_depth + 1)
    return added
