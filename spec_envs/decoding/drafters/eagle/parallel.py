"""Drafter of a parallel head (P-EAGLE, arXiv 2602.01469): one forward predicts every position of a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spec_envs.decoding.drafters.eagle.drafter import EagleModel
from spec_envs.decoding.drafters.heads import BlockDrafter
from spec_envs.decoding.tree import Children


class ParallelDrafter(BlockDrafter[EagleModel]):
    """Drafts a block of tokens with one forward of a parallel head.

    Row t reads the target's features of token t and the embedding of token t + 1, as a row of an EAGLE-3 head does.
    The last unread row is followed by mask rows, one for each further position. A mask row reads ``mask_token`` and
    ``mask_hidden`` in place of a token and the target's states; it sees the text and the mask rows before it, and none
    of them stays in the cache.
    """

    def __init__(self, model: EagleModel, width: int = 10, max_depth: int = 12):
        super().__init__(model, width, max_depth)
        self.rows = self.block - 1

    def draft(self, features: Tensor, tokens: list[int]) -> Children:
        """Read tokens of the text and predict the block after them; see ``BlockDrafter.draft``."""
        return self._read(features, tokens, self.rows, self.block)

    def read(self, features: Tensor, tokens: Sequence[int]) -> None:
        """Commit rows for positions of the text to the cache; see ``HeadDrafter.read``."""
        self._read(features, tokens, 0, 0)

    def _read(self, features: Tensor, tokens: Sequence[int], masks: int, last: int) -> Children:
        """Commit rows of the text, and return the children of the last rows of these and of so many mask rows."""
        model, cache = self.model, self.cache
        read = torch.cat([features, model.mask_hidden.expand(masks, -1)])
        ids = [*tokens, *[model.mask_token] * masks]
        _, children = model.step(read, ids, None, cache, self.vocabulary, self.width, last, fuses=True)
        cache.length += len(tokens)
        return children
