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
ALTERNATIVES = 3  # proposed beside each token of a chain; a fourth was worth nothing


class Beside(NamedTuple):
    """The alternatives of the one child of each of n nodes: the tokens that are most probable after it.

    Attributes:
        tokens, log_probs: ``[n, ALTERNATIVES]`` or fewer columns, best first; −inf where there are fewer.
    """

    tokens: np.ndarray
    log_probs: np.ndarray


class Children(NamedTuple):
    """The tokens that a drafter proposes after each of n nodes.

    Attributes:
        tokens, log_probs: the children and their log-probabilities, ``[n, width]``, best first; −inf where a node has
            fewer children.
        entropies: of the drafter's distribution after each node, in nats, ``[n]``.
        proposal: the distribution from which the one child of a sampled chain was drawn, or None.
        beside: of the most probable child of each node the alternatives, or None.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray
    proposal: Proposal | None = None
    beside: Beside | None = None


class Tree:
    """The candidates of a cycle: up to ``width`` children per node, up to ``width`` nodes expanded per level (EAGLE-2,
    arXiv 2406.16858).

    A chain, whose width is 1, has alternatives beside its tokens, which may be verified with it: leaves, after which
    nothing is drafted.

    Args:
        width: most children per node, and most nodes expanded per level.
        max_depth: most expansions after the first level.

    Attributes:
        max_depth: most expansions after the first level.
        size: number of nodes, n.
        tokens: of the nodes, ``[n]``.
        parents: their parents' ids, ``[n]``; ``ROOT`` on level 0.
        levels: ``[n]``, from 0.
        scores: log-probability of the path from the root to each node, ``[n]``, float32.
        frontier: ids of the nodes that the next expansion feeds to the drafter, best first.
        entropies: for each level the entropies in nats of the distributions that its nodes are from.
        proposals: for each node of a sampled chain the distribution from which it was drawn; empty otherwise.
    """

    def __init__(self, width: int, max_depth: int):
        self.capacity = capacity = width + width * width * max_depth
        self.width, self.max_depth = width, max_depth
        self._tokens = np.zeros(capacity, dtype=np.int64)
        self._parents = np.full(capacity, ROOT, dtype=np.int64)
        self._scores = np.zeros(capacity, dtype=np.float32)
        self._ids = np.arange(capacity)
        self._levels = np.zeros(capacity, dtype=np.int64)
        self._beside = np.zeros((capacity, ALTERNATIVES), dtype=np.int64)  # alternatives, and the scores of their paths
        self._beside_scores = np.full((capacity, ALTERNATIVES), NEVER, dtype=np.float32)
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
    def most_rows(self) -> int:
        """Most nodes that are verified at once, a chain's alternatives included."""
        return self.capacity * (1 + ALTERNATIVES) if self.width == 1 else self.capacity

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
        there = children.log_probs[0] > NEVER
        new = self._add(children, children.tokens[0, there])
        self._parents[new] = ROOT  # a chain before had parents there
        self._scores[new] = children.log_probs[0, there]
        self.frontier = self._ids[new]
        if self.width == 1:
            self._add_alternatives(children.beside, np.float32(0.0))

    def grow(self, children: Children) -> np.ndarray:
        """Add a level, the children of every frontier node.

        Returns:
            For each node of the new frontier the index of its parent in the old one.

        Raises:
            ValueError: the tree is full.
        """
        fed = self.frontier
        rows, places = (children.log_probs > NEVER).nonzero()
        new = self._add(children, children.tokens[rows, places])
        self._parents[new] = fed[rows]
        scores = self._scores[new]
        np.add(self._scores[fed][rows], children.log_probs[rows, places], out=scores, casting="same_kind")
        best = (-scores).argsort(kind="stable")[: self.width]
        self.frontier = best + new.start
        if self.width == 1:
            self._add_alternatives(children.beside, self._scores[fed[0]])
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

    def beside(self, chain: int, count: int, chance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, parents, levels and scores of the alternatives beside the first tokens of a chain, ``[n]``; parents
        are indices into the chain, or ``ROOT``.

        Args:
            chain: how many of its tokens.
            count: most alternatives of each.
            chance: least probability of the path to an alternative, in the drafter's own estimate.
        """
        for level, proposal in enumerate(self.proposals[:chain]):
            self._propose_alternatives(level, proposal)
        scores = self._beside_scores[:chain, :count]
        kept = scores > NEVER
        if chance:
            kept &= scores >= np.float32(np.log(chance))
        levels, _ = kept.nonzero()
        return self._beside[:chain, :count][kept], levels - 1, levels, scores[kept]

    def _add_alternatives(self, beside: Beside | None, above: np.float32) -> None:
        """Keep the alternatives of the token of a chain that was just added; ``above`` is the score before it."""
        self._beside_scores[self.size - 1] = NEVER
        if beside is not None:
            own = (self.size - 1, slice(beside.tokens.shape[1]))
            self._beside[own] = beside.tokens[0]
            np.add(beside.log_probs[0], above, out=self._beside_scores[own], casting="same_kind")

    def _propose_alternatives(self, level: int, proposal: Proposal) -> None:
        """Take the alternatives of a token that was drawn from the rest of its distribution, which needs a search of that;
        so they are taken only where they are verified."""
        tokens = proposal.best(ALTERNATIVES, int(self._tokens[level]))
        above = self._scores[level - 1] if level else np.float32(0.0)
        chances = np.array([proposal.probability(token) for token in tokens.tolist()])
        self._beside[level, : len(tokens)] = tokens
        self._beside_scores[level, : len(tokens)] = above + np.log(chances)

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
