"""Prompt lookup: what followed the last time that the text ended like this is drafted; no weights (Saxena 2023,
`prompt-lookup-decoding`; Yang et al. 2023, arXiv 2304.04487)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from spec_envs.decoding.tree import Children, Tree


class LookupDrafter:
    """Drafts the continuation of the latest earlier occurrence of the text's last tokens, the longest that occurs.

    Where none does, the tree stays empty, and a cycle is one of plain decoding. There are no probabilities: every
    drafted token counts as certain.

    Args:
        vocab, context: of the target.
        ngram: most tokens that have to match; the last one alone is tried last.
    """

    capture: tuple[int, ...] = ()
    width = 1

    def __init__(self, vocab: int, context: int, ngram: int = 3):
        self.vocab, self.context, self.ngram = vocab, context, ngram

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Note where every run of up to ``ngram`` tokens ends last, the text's own end left out."""
        self.text: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}
        self._append(text)

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append tokens to the text."""
        self._append(tokens)

    def root(self, tree: Tree) -> None:
        """Find the earlier occurrence, and draft the token behind it."""
        tree.clear()
        lengths = range(min(self.ngram, len(self.text)), 0, -1)
        found = (self.ends.get(tuple(self.text[-n:])) for n in lengths)
        self.next = next((end for end in found if end is not None), len(self.text))
        if self.next < len(self.text):
            tree.start(self._child())

    def expand(self, tree: Tree) -> None:
        """Draft the token behind the last one, as far as the text goes."""
        if tree.size and self.next < len(self.text):
            tree.grow(self._child())

    def _child(self) -> Children:
        token, self.next = self.text[self.next], self.next + 1
        return Children(np.array([[token]]), np.zeros((1, 1), np.float32), np.zeros(1, np.float32))

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for n in range(1, min(self.ngram, len(self.text)) + 1):
                self.ends[tuple(self.text[-n:])] = len(self.text)
            self.text.append(token)
