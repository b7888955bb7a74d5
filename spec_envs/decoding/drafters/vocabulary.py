"""What can be drafted in a text: a shortlist, and the tokens of the text itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spec_envs.decoding.model.transformer import Transformer

TOGETHER = 16  # positions that are drafted behind in one forward


class Vocabulary:
    """A drafter's shortlist and, where its output rows are the target's own, every token of one text so far (names in an
    article to summarise, identifiers of a program).

    Args:
        shortlist: target ids ``[n]``.
        output_rows: output rows ``[n, hidden]`` of target ids ``[n]``, or None where the drafter has others.
        target: for its device and dtypes.

    Attributes:
        ids: target ids, the shortlist first.
        rows: output rows of the ids behind the shortlist, or None.
    """

    def __init__(self, shortlist: np.ndarray, output_rows: Callable[[Tensor], Tensor] | None, target: Transformer):
        self.ids, self.output_rows, self.target = shortlist, output_rows, target
        self.rows: Tensor | None = None
        self.known = np.zeros(target.shape.vocab, dtype=bool)
        self.known[shortlist] = True

    def add(self, tokens: Sequence[int]) -> None:
        """Note tokens of the text."""
        new = sorted({token for token in tokens if not self.known[token]})
        if self.output_rows is None or not new:
            return
        self.known[new] = True
        self.ids = np.concatenate([self.ids, new])
        rows = self.output_rows(torch.tensor(new, device=self.target.device)).to(self.target.precision.hidden)
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows])

    def grows_by(self, token: int) -> bool:
        """Whether the token would be new."""
        return self.output_rows is not None and not self.known[token]

    def logits(self, normed: Tensor) -> Tensor | None:
        """Of normed hidden states ``[n, hidden]``: those of the ids behind the shortlist, if there are any."""
        return None if self.rows is None else F.linear(normed, self.rows)


def same_vocabulary(vocabulary: Vocabulary | None, text: Sequence[int]) -> Iterator[slice]:
    """Positions of a text behind which is drafted in one forward: as many as have the same vocabulary, for nothing must be
    drafted that only a later position has seen. Their tokens have joined it when they are given out."""
    at = 0
    while at < len(text):
        if vocabulary is not None:
            vocabulary.add(text[at : at + 1])
        stop = at + 1
        while stop < min(len(text), at + TOGETHER) and not (vocabulary and vocabulary.grows_by(text[stop])):
            stop += 1
        yield slice(at, stop)
        at = stop
