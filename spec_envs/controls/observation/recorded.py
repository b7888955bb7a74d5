"""Observations of recorded trees and chains.

Every function reads many cycles of a trace at once: the row of the trace of each, and the size that is drafted there.
The formulas that they share with live trees are in ``tree_formulas``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from spec_envs.controls.observation.tree_formulas import gains, survival
from spec_envs.decoding.traces.files import RecordedTexts
from spec_envs.decoding.traces.full_trees import grown, level_slice
from spec_envs.decoding.tree import NEVER

ENTROPY_UNIT = 10.0  # nats that the observation shows as 1
DEPTH_UNIT = 10.0  # expansions that the published observation shows as 1

Reader = Callable[[Any, np.ndarray, np.ndarray], np.ndarray]
"""Returns what an entry of the observation shows, ``[n]`` or ``[n, size]``, given recorded trees (or chains), rows of
the trace ``[n]`` and the sizes ``[n]`` drafted there."""


class RecordedTrees:
    """The full trees of a trace; a cycle drafts the first levels of one.

    Attributes:
        scores: ``[rows, C]``, path log-probability of every node.
        frontiers: ``[rows, L, W]``, the nodes of each level that are expanded, best first.
        stops: ``[L]``, nodes of a full tree of each depth.
    """

    def __init__(self, trace: RecordedTexts, max_depth: int, width: int):
        self.width, self.max_depth = width, max_depth
        self.stops = np.array([level_slice(level, width).stop for level in range(max_depth + 1)])
        trees = grown(np.asarray(trace.columns["log_probs"][:, : self.stops[-1]]), width)
        self.scores, self.frontiers, self.entropies = trees.scores, trees.frontiers, trace.columns["entropies"]

    @cached_property
    def survival(self) -> np.ndarray:
        """Summed path probability of every level, ``[rows, L]``."""
        return survival(self.scores, [0, *self.stops[:-1]])


class RecordedChains:
    """The longest chains of a trace; a cycle drafts the first tokens of one.

    Attributes:
        steps, paths: ``[rows, K]``, log-probability of each token, and of the chain up to it.
        entropies: ``[rows, K]``, entropy in nats of the distribution that each token is from.
        copied: ``[rows, K + 1]``, True where the token after that many is copied.
    """

    def __init__(self, trace: RecordedTexts, k_max: int):
        self.k_max = k_max
        self.paths = np.asarray(trace.columns["log_probs"])[:, :k_max].cumsum(1, dtype=np.float32)
        self.steps = self.paths.copy()
        self.steps[:, 1:] -= self.paths[:, :-1]
        self.entropies = np.asarray(trace.columns["entropies"])[:, :k_max]
        self.copied = np.pad(copied_tokens(trace, k_max), ((0, 0), (0, 1)))

    def means(self) -> np.ndarray:
        """Return the mean probability and mean entropy of the first k tokens of every chain, ``[rows, K + 1, 2]``, as
        they are observed after a chain of k tokens."""
        totals = np.zeros((len(self.steps), self.k_max + 1, 2))
        totals[:, 1:, 0] = np.exp(self.steps).cumsum(1)
        totals[:, 1:, 1] = self.entropies.cumsum(1) / ENTROPY_UNIT
        counts = np.maximum(1, np.arange(self.k_max + 1))
        return np.clip(totals / counts[None, :, None], 0.0, 1.0).astype(np.float32)


def copied_tokens(trace: RecordedTexts, k_max: int) -> np.ndarray:
    """Return which of the first tokens of every chain are copied, ``[rows, K]``."""
    copied = np.asarray(trace.columns["copied"])[:, :k_max]
    return copied & (np.arange(k_max) < np.asarray(trace.columns["length"])[:, None])


def recorded_survival(trees: RecordedTrees, row: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the summed path probability of every level, 0 where it is not grown, ``[n, L]``."""
    levels = np.arange(trees.max_depth + 1)
    return np.where(levels <= depth[:, None], trees.survival[row], np.float32(0))


def recorded_frontier(trees: RecordedTrees, row: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the path probabilities of the nodes that the next expansion would feed, best first, ``[n, W]``."""
    probabilities: np.ndarray = np.exp(trees.scores[row[:, None], trees.frontiers[row, depth]])
    return probabilities


def recorded_gains(trees: RecordedTrees, row: np.ndarray, depth: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Return ``gains`` of the trees as far as they are grown, ``[n, budgets]``."""
    most = trees.stops[depth.max(initial=0)]
    there = np.arange(most) < trees.stops[depth][:, None]
    return gains(np.where(there, trees.scores[row, :most], -np.inf), budgets, trees.max_depth)


def recorded_entropy(trees: RecordedTrees, row: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the entropy of the distribution that the last level's first nodes are from, in units of 10 nats."""
    fed = np.where(depth > 0, 1 + trees.width * (depth - 1), 0)  # the node that the last expansion fed first
    entropies: np.ndarray = trees.entropies[row, fed] / ENTROPY_UNIT
    return entropies


def recorded_expansions(trees: RecordedTrees, row: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the expansions so far as a share of the most there can be."""
    return depth / trees.max_depth


def recorded_depth(trees: RecordedTrees, row: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the expansions so far, in units of ten."""
    return depth / DEPTH_UNIT


def recorded_scores(trees: RecordedTrees, row: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the path log-probabilities of all nodes, 0 for missing ones, ``[n, C]``."""
    there = np.arange(trees.scores.shape[1]) < trees.stops[depth][:, None]
    return first(np.where(there, trees.scores[row], NEVER))


def recorded_last_level(trees: RecordedTrees, row: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the path log-probabilities of the nodes added last, 0 for missing ones, ``[n, W²]``."""
    size = trees.width * trees.width
    nodes = np.where(depth > 0, trees.stops[depth] - size, 0)[:, None] + np.arange(size)
    there = nodes < trees.stops[depth][:, None]
    return first(np.where(there, trees.scores[row[:, None], np.where(there, nodes, 0)], NEVER))


def first(scores: np.ndarray) -> np.ndarray:
    """Return the scores ``[n, …]`` of the nodes that there are, in order, with 0 after them."""
    order = (scores == NEVER).argsort(1, kind="stable")
    ordered = np.take_along_axis(scores, order, 1)
    return np.where(ordered == NEVER, 0.0, ordered)


def recorded_size(chains: RecordedChains, row: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the tokens drafted so far as a share of the most there can be."""
    return size / chains.k_max


def recorded_probability(chains: RecordedChains, row: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the probability of the last token; 1 before the first."""
    return np.where(size > 0, np.exp(chains.steps[row, size - 1]), 1.0)


def recorded_token_entropy(chains: RecordedChains, row: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the entropy of the distribution that the last token is from, in units of 10 nats; 0 before the first."""
    return np.where(size > 0, chains.entropies[row, size - 1] / ENTROPY_UNIT, 0.0)


def recorded_path(chains: RecordedChains, row: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the product of the tokens' probabilities; 1 before the first."""
    return np.where(size > 0, np.exp(chains.paths[row, size - 1]), 1.0)


def recorded_free(chains: RecordedChains, row: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return whether the next token is a copy."""
    free: np.ndarray = chains.copied[row, size]
    return free
