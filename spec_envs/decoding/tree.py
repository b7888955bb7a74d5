"""The token tree of one cycle: grown level by level, pruned to a budget, verified under an ancestor mask.

The root is the last token of the text and is not a node. Node ids run in the order in which nodes were added, so a
parent's id is below its children's, and every level is a contiguous range.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spec_envs.decoding.sampling import Proposal

ROOT = -1


class Children(NamedTuple):
    """What a drafter proposes behind each of n nodes.

    tokens and log_probs ``[n, width]``, best first; entropies ``[n]`` in nats of the distributions they are from;
    proposal: where the one child was drawn, the distribution that it was drawn from.
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    entropies: np.ndarray
    proposal: Proposal | None = None


class Tree:
    """Candidates of a cycle, at most ``width`` per node and ``width`` expanded per level (EAGLE-2, arXiv 2406.16858).

    Attributes, each an array over the nodes:
        tokens, parents (``ROOT`` on level 0), levels, scores (log-probability of the path from the root).
        frontier: ids of the nodes that the next expansion feeds to the drafter, best first.
        entropies: per level, in nats, of the distributions its nodes are from.
        proposals: of a chain that was drawn, the distribution that each node was drawn from; else empty.
    """

    def __init__(self, width: int, max_depth: int):
        self.capacity = capacity = width + width * width * max_depth
        self.width = width
        self._tokens = np.zeros(capacity, dtype=np.int64)
        self._parents = np.full(capacity, ROOT, dtype=np.int64)
        self._levels = np.zeros(capacity, dtype=np.int64)
        self._scores = np.zeros(capacity, dtype=np.float32)
        self.clear()

    def clear(self) -> None:
        """Drop all nodes."""
        self.size = 0
        self.level_starts: list[int] = []
        self.frontier = np.zeros(0, dtype=np.int64)
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
    def expansions(self) -> int:
        """Expansions after the first level."""
        return max(0, len(self.level_starts) - 1)

    @property
    def last_level(self) -> np.ndarray:
        """Path log-probabilities of the nodes added last."""
        return self._scores[self.level_starts[-1] : self.size] if self.level_starts else self.scores

    def start(self, children: Children) -> None:
        """Level 0: the children of the root."""
        self.clear()
        width = children.tokens.shape[1]
        self._add(children, np.full(width, ROOT), children.log_probs[0])
        self.frontier = np.arange(width)

    def grow(self, children: Children) -> np.ndarray:
        """A further level: the children of every frontier node.

        Returns:
            For each node of the new frontier, the index of its parent in the old one.
        """
        width = children.tokens.shape[1]
        scores = (self._scores[self.frontier][:, None] + children.log_probs).ravel()
        first = self.size
        self._add(children, np.repeat(self.frontier, width), scores)
        best = np.argsort(-scores, kind="stable")[: self.width]
        self.frontier = first + best
        return best // width

    def select(self, budget: int) -> np.ndarray:
        """Ids (ascending) of the ``budget`` best candidates by path log-probability.

        A child never scores above its parent and ties go to the smaller id, so the set is a connected tree.
        """
        return np.sort(np.argsort(-self.scores, kind="stable")[:budget])

    def subtree(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, parents (as indices into ``ids``, or ``ROOT``) and levels of a connected selection."""
        index = np.full(self.size + 1, ROOT)
        index[ids] = np.arange(len(ids))
        return self.tokens[ids], index[self.parents[ids]], self.levels[ids]

    def _add(self, children: Children, parents: np.ndarray, scores: np.ndarray) -> None:
        tokens = children.tokens.ravel()
        new = slice(self.size, self.size + len(tokens))
        if new.stop > len(self._tokens):
            raise ValueError(f"the tree is full at {self.expansions} expansions")
        self._tokens[new], self._parents[new] = tokens, parents
        self._scores[new] = scores
        self._levels[new] = len(self.level_starts)
        self.level_starts.append(new.start)
        self.size = new.stop
        self.entropies.append(children.entropies)
        if children.proposal is not None:
            self.proposals.append(children.proposal)


def ancestors(parents: np.ndarray) -> np.ndarray:
    """Which rows of a verification see which: ``[n + 1, n + 1]`` for n nodes behind the root in row 0.

    A node sees the root, its ancestors and itself.
    """
    n = len(parents)
    visible = np.zeros((n + 1, n + 1), dtype=bool)
    visible[0, 0] = True
    for row, parent in enumerate(parents, start=1):
        visible[row] = visible[parent + 1]
        visible[row, row] = True
    return visible
