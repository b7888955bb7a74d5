"""The token tree of one cycle: grown level by level, pruned to a budget, verified under an ancestor mask.

The root is the last token of the text and is not a node. Nodes are numbered in the order in which they were added, so a
parent's id is smaller than its children's, and the ids of a level are a contiguous range.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spec_envs.decoding.sampling import Proposal

ROOT, NEVER = -1, -np.inf
EMPTY = np.zeros(0, np.int64)
ALTERNATIVES = 3  # most that are kept beside each token of a chain; a fourth was worth nothing


class Children(NamedTuple):
    """The tokens that a drafter proposes after each of n nodes.

    Attributes:
        tokens, log_probs: the children and their log-probabilities, ``[n, width]``, best first; −inf where a node has
            fewer children. Further columns of a chain are the alternatives of its one child.
        entropies: of the drafter's distribution after each node, in nats, ``[n]``.
        proposal: the distribution from which the one child of a sampled chain was drawn, or None.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray
    proposal: Proposal | None = None


class Alternatives(NamedTuple):
    """The tokens that are verified beside one token of a chain.

    Attributes:
        tokens: ``[n]``.
        scores: log-probability of the path from the root to each, ``[n]``, float32.
    """

    tokens: np.ndarray
    scores: np.ndarray


class Tree:
    """The candidates of a cycle: up to ``width`` children per node, up to ``width`` nodes expanded per level (EAGLE-2,
    arXiv 2406.16858).

    A chain, whose width is 1, may have alternatives beside its tokens: leaves, after which nothing is drafted.

    Args:
        width: most children per node, and most nodes expanded per level.
        max_depth: most expansions after the first level.
        least: lowest log-probability of the path to an alternative that is kept.

    Attributes:
        max_depth: most expansions after the first level.
        alternatives: of the tokens of a chain, up to the last one that has any.
        size: number of nodes, n.
        tokens: of the nodes, ``[n]``.
        parents: their parents' ids, ``[n]``; ``ROOT`` on level 0.
        levels: ``[n]``, from 0.
        scores: log-probability of the path from the root to each node, ``[n]``, float32.
        frontier: ids of the nodes that the next expansion feeds to the drafter, best first.
        entropies: for each level the entropies in nats of the distributions that its nodes are from.
        proposals: for each node of a sampled chain the distribution from which it was drawn; empty otherwise.
    """

    def __init__(self, width: int, max_depth: int, least: float = -np.inf):
        self.capacity = capacity = width + width * width * max_depth
        self.width, self.max_depth, self.least = width, max_depth, np.float32(least)
        self._tokens = np.zeros(capacity, dtype=np.int64)
        self._parents = np.full(capacity, ROOT, dtype=np.int64)
        self._scores = np.zeros(capacity, dtype=np.float32)
        self._ids = np.arange(capacity)
        self._levels = np.zeros(capacity, dtype=np.int64)
        # of nodes in a selection; the last one stays, for parents on level 0
        self._places = np.full(capacity + 1, ROOT)
        self.clear()

    def clear(self) -> None:
        """Drop all nodes."""
        self.size = 0
        self.level_starts: list[int] = []
        self.frontier = self._ids[:0]
        self.entropies: list[np.ndarray] = []
        self.proposals: list[Proposal] = []
        self.alternatives: list[Alternatives] = []

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens[: self.size]

    @property
    def parents(self) -> np.ndarray:
        return self._parents[: self.size]

    @property
    def levels(self) -> np.ndarray:
        return self._levels[: self.size]

    @property
    def scores(self) -> np.ndarray:
        return self._scores[: self.size]

    @property
    def expansions(self) -> int:
        """Expansions after the first level."""
        return max(0, len(self.level_starts) - 1)

    @property
    def is_chain(self) -> bool:
        """True if every level has one node."""
        return self.size == len(self.level_starts)

    @property
    def last_level(self) -> np.ndarray:
        """Scores of the nodes of the last level."""
        return self._scores[self.level_starts[-1] : self.size] if self.level_starts else self.scores

    def start(self, children: Children) -> None:
        """Clear the tree and add level 0, the children of the root."""
        self.clear()
        there = children.log_probs[0, : self.width] > NEVER
        new = self._add(children, children.tokens[0, : self.width][there])
        self._parents[new] = ROOT  # a chain before had parents there
        self._scores[new] = children.log_probs[0, : self.width][there]
        self.frontier = self._ids[new]
        if children.tokens.shape[1] > self.width:
            self._add_alternatives(children, np.float32(0.0))

    def grow(self, children: Children) -> np.ndarray:
        """Add a level, the children of every frontier node.

        Returns:
            For each node of the new frontier the index of its parent in the old one.

        Raises:
            ValueError: the tree is full.
        """
        fed = self.frontier
        rows, places = (children.log_probs[:, : self.width] > NEVER).nonzero()
        new = self._add(children, children.tokens[rows, places])
        self._parents[new] = fed[rows]
        scores = self._scores[new]
        np.add(self._scores[fed][rows], children.log_probs[rows, places], out=scores, casting="same_kind")
        best = (-scores).argsort(kind="stable")[: self.width]
        self.frontier = best + new.start
        if children.tokens.shape[1] > self.width:
            self._add_alternatives(children, self._scores[fed[0]])
        parents: np.ndarray = rows[best]
        return parents

    def select(self, budget: int) -> np.ndarray:
        """Return the ids (ascending) of the ``budget`` nodes of the highest scores.

        A child never scores above its parent and ties go to the smaller id, so the nodes form a connected tree.
        """
        if budget == 0 or budget >= self.size:
            return self._ids[: min(budget, self.size)]
        ids = (-self.scores).argsort(kind="stable")[:budget]
        ids.sort()
        return ids

    def subtree(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, parents (indices into ``ids``, or ``ROOT``) and levels of a connected selection,
        ``[len(ids)]``."""
        if not len(ids):
            return EMPTY, EMPTY, EMPTY
        places = self._places
        places[ids] = self._ids[: len(ids)]
        return self._tokens[ids], places[self._parents[ids]], self._levels[ids]

    def beside(self, chain: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, parents and levels of the alternatives beside the first ``chain`` tokens of a chain; parents are
        indices into these tokens, or ``ROOT``."""
        kept = self.alternatives[:chain]
        if not any(len(one.tokens) for one in kept):
            return EMPTY, EMPTY, EMPTY
        levels = np.repeat(self._ids[: len(kept)], [len(one.tokens) for one in kept])
        return np.concatenate([one.tokens for one in kept]), levels - 1, levels

    def _add_alternatives(self, children: Children, above: np.float32) -> None:
        """Keep the probable alternatives of the token of a chain that was just added; ``above`` is the score before
        it."""
        while len(self.alternatives) < len(self.level_starts) - 1:  # tokens before it that have none
            self.alternatives.append(Alternatives(EMPTY, EMPTY.astype(np.float32)))
        scores = children.log_probs[0, self.width :].astype(np.float32) + above
        kept = (scores >= self.least) & (scores > NEVER)
        self.alternatives.append(Alternatives(children.tokens[0, self.width :][kept], scores[kept]))

    def _add(self, children: Children, tokens: np.ndarray) -> slice:
        """Add a level of nodes with these tokens, except for their parents and scores; return the new ids."""
        first = self.size
        new = slice(first, first + len(tokens))
        if new.stop > self.capacity:
            raise ValueError(f"the tree is full at {self.expansions} expansions")
        self._tokens[new] = tokens
        self._levels[new] = len(self.level_starts)
        self.level_starts.append(first)
        self.size = new.stop
        self.entropies.append(children.entropies)
        if children.proposal is not None:
            self.proposals.append(children.proposal)
        return new


def ancestors(parents: np.ndarray) -> np.ndarray:
    """Return which rows of a verification see which, ``[n + 1, n + 1]`` (bool): row 0 is the root, row i + 1 node i.

    A node sees the root, its ancestors and itself.
    """
    n = len(parents)
    visible = np.zeros((n + 1, n + 1), dtype=bool)
    visible[0, 0] = True
    for row, parent in enumerate(parents, start=1):
        visible[row] = visible[parent + 1]
        visible[row, row] = True
    return visible
