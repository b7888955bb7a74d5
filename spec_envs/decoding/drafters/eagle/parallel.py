"""Drafter of a parallel head (P-EAGLE, arXiv 2602.01469): one forward predicts every position of a block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.drafters.eagle.drafter import EagleDrafter, EagleModel
from spec_envs.decoding.tree import Children, Tree


class ParallelDrafter(EagleDrafter):
    """Drafts a block of tokens with one forward of a parallel head.

    The last unread row of the text is followed by mask rows, one for each further position. A mask row reads
    ``mask_token`` and ``mask_hidden`` in place of a token and the target's states; it sees the text and the mask rows
    before it, and none of them stays in the cache. A position's children do not depend on the tokens before it in the
    block, so all nodes of a level have the same ones, and expanding the tree costs no forward.

    Args:
        model: a parallel head.
        width: children per node, and nodes expanded per level.
        max_depth: most expansions after the first level.

    Attributes:
        block: how many positions a forward predicts: those that the head was trained for, at most ``max_depth`` + 1.

    Raises:
        ValueError: ``width`` is larger than the head's vocabulary.
    """

    def __init__(self, model: EagleModel, width: int = 10, max_depth: int = 12):
        super().__init__(model, width, max_depth)
        self.block = min(model.variant.block or max_depth + 1, max_depth + 1)
        self.frontier_rows = self.block

    def root(self, tree: Tree) -> int:
        """Draft a block by one forward over the unread tokens and the mask rows; return the number of rows."""
        self.vocabulary.add(self.tokens)
        unread, masks = len(self.tokens), self.block - 1
        self.children = self.draft(torch.cat(self.features), self.tokens)
        self.features, self.tokens = [], []
        self.drafted = 1
        tree.start(at(self.children, 0, 1))
        return unread + masks

    def expand(self, tree: Tree) -> int:
        """Grow the tree by the children of the next position, unless the block ends here; return 0, without a
        forward."""
        if self.drafted < self.block:
            tree.grow(at(self.children, self.drafted, len(tree.frontier)))
            self.drafted += 1
        return 0

    def draft(self, features: Tensor, tokens: list[int]) -> Children:
        """Read tokens of the text and return the children of every position of the block after them.

        Args:
            features: of the target before each token, ``[n, states * target hidden]``.
            tokens: ``[n]``.
        """
        model, cache, masks = self.model, self.cache, self.block - 1
        read = torch.cat([features, model.mask_hidden.expand(masks, -1)])
        ids = [*tokens, *[model.mask_token] * masks]
        _, children = model.step(read, ids, None, cache, self.vocabulary, self.width, self.block, fuses=True)
        cache.length += len(tokens)
        return children


def at(children: Children, row: int, nodes: int) -> Children:
    """Return the children of a row for each of so many nodes."""
    tokens, log_probs = (np.repeat(part[row : row + 1], nodes, 0) for part in children[:2])
    return Children(tokens, log_probs, children.entropies[row].repeat(nodes))
