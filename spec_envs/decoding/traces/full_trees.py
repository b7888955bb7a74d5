"""Full trees: the tree drafted at every position of a text to its whole depth, for many positions at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spec_envs.decoding.tree import NEVER


class Grown(NamedTuple):
    """Full trees ``[rows, C]``: path log-probability and parent of every node, and ``[rows, L, W]`` the nodes of each
    level that were expanded, best first. The log-probability is −inf where a tree has no node."""

    scores: np.ndarray
    parents: np.ndarray
    frontiers: np.ndarray


def grown(log_probs: np.ndarray, width: int) -> Grown:
    """Return the full trees of nodes with these log-probabilities ``[rows, C]``, as ``Tree`` grows them."""
    rows, nodes = log_probs.shape
    levels = 1 + (nodes - width) // (width * width)
    scores, parents = np.empty((rows, nodes), np.float32), np.full((rows, nodes), -1, np.int16)
    frontiers = np.empty((rows, levels, width), np.int16)
    scores[:, :width] = log_probs[:, :width]
    frontiers[:, 0] = np.arange(width)
    for level in range(1, levels):
        here = level_slice(level, width)
        above = frontiers[:, level - 1]
        children = log_probs[:, here].reshape(rows, width, width)
        scores[:, here] = (np.take_along_axis(scores, above.astype(np.intp), 1)[:, :, None] + children).reshape(
            rows, -1
        )
        parents[:, here] = np.repeat(above, width, 1)
        frontiers[:, level] = here.start + np.argsort(-scores[:, here], 1, kind="stable")[:, :width]
    return Grown(scores, parents, frontiers)


def level_slice(level: int, width: int) -> slice:
    """Return the ids of the nodes of a level of a full tree."""
    start = width + width * width * (level - 1) if level else 0
    return slice(start, width + width * width * level)


def sizes(scores: np.ndarray, width: int) -> np.ndarray:
    """Return how many nodes trees with these path log-probabilities ``[rows, C]`` have as far as each level,
    ``[rows, L]``."""
    levels = 1 + (scores.shape[1] - width) // (width * width)
    stops = [level_slice(level, width).stop for level in range(levels)]
    found: np.ndarray = (scores > NEVER).cumsum(1)[:, np.array(stops) - 1]
    return found


def on_path(tree: Grown, drafted: np.ndarray, text: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which nodes of full trees lie on the path of the text, and their place among the candidates.

    Args:
        tree, drafted: the trees of a whole text and the tokens of their nodes, ``[n, C]``; row i is drafted after token
            i.
        text: tokens of the text, ``[n]``.

    Returns:
        ``path`` ``[n, L]`` and ``ranks`` ``[n, L, L]``, as in the columns of a trace (``trace.py``).
    """
    n, levels = tree.frontiers.shape[:2]
    path = np.full((n, levels), -1, np.int16)
    above = np.full(n, -1)
    alive = np.ones(n, bool)
    for level in range(levels):
        here = level_slice(level, width)
        wanted = np.full(n, -1)
        wanted[: max(0, n - 1 - level)] = text[1 + level :]
        hit = (drafted[:, here] == wanted[:, None]) & (tree.parents[:, here] == above[:, None]) & alive[:, None]
        hit &= tree.scores[:, here] > NEVER
        alive = hit.any(1)
        above = np.where(alive, here.start + hit.argmax(1), -2)
        path[:, level] = np.where(alive, above, -1)
    ranks = np.full((n, levels, levels), -1, np.int16)
    ids = np.arange(tree.scores.shape[1])
    for level in range(levels):
        node = path[:, level].astype(np.intp)
        own = np.take_along_axis(tree.scores, np.maximum(node, 0)[:, None], 1)
        better = (tree.scores > own) | ((tree.scores == own) & (ids < node[:, None]))
        counts = better.cumsum(1)
        for depth in range(level, levels):
            ranks[:, depth, level] = np.where(node >= 0, counts[:, level_slice(depth, width).stop - 1], -1)
    return path, ranks
