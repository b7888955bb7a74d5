"""The tokens that can be drafted in a text: a shortlist, and the tokens of the text itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spec_envs.decoding.model.transformer import Transformer

TOGETHER = 16  # most positions of a text whose drafts share a forward


class Vocabulary:
    """A drafter's shortlist and the tokens of one text so far (names in an article to summarise, identifiers in a
    program).

    The tokens of the text join where the drafter's output rows are the target's own.

    Args:
        shortlist: target ids ``[n]``.
        output_rows: returns output rows ``[n, hidden]`` of target ids ``[n]``; None where the drafter has its own.
        target: for its device and dtypes.
        known: how many ids have output rows, where it is not all of the target's.

    Attributes:
        ids: target ids that can be drafted, the shortlist first.
        rows: output rows ``[m, hidden]`` of the ids after the shortlist, or None.
    """

    def __init__(
        self,
        shortlist: np.ndarray,
        output_rows: Callable[[Tensor], Tensor] | None,
        target: Transformer,
        known: int | None = None,
    ):
        self.ids, self.output_rows, self.target = shortlist, output_rows, target
        self.rows: Tensor | None = None
        self.known = np.zeros(target.shape.vocab, dtype=bool)
        self.known[shortlist] = True
        self.known[len(self.known) if known is None else known :] = True  # never joins

    def add(self, tokens: Sequence[int]) -> None:
        """Add tokens of the text."""
        new = sorted({token for token in tokens if not self.known[token]})
        if self.output_rows is None or not new:
            return
        self.known[new] = True
        self.ids = np.concatenate([self.ids, new])
        rows = self.output_rows(torch.tensor(new, device=self.target.device)).to(self.target.precision.hidden)
        self.rows = rows if self.rows is None else torch.cat([self.rows, rows])

    def grows_by(self, token: int) -> bool:
        """Return whether adding ``token`` would make the vocabulary larger."""
        return self.output_rows is not None and not self.known[token]

    def logits(self, normed: Tensor) -> Tensor | None:
        """Return logits ``[n, m]`` of the ids after the shortlist for normed hidden states ``[n, hidden]``; None
        without any."""
        return None if self.rows is None else F.linear(normed, self.rows)


def same_vocabulary(vocabulary: Vocabulary | None, text: Sequence[int]) -> Iterator[slice]:
    """Yield runs of positions of a text at which the vocabulary is the same, up to ``TOGETHER`` long.

    Drafts after the positions of a run can share a forward: none of them could draft a token that only a later position
    has seen. The tokens of a run have joined the vocabulary when it is yielded.
    """
    at = 0
    while at < len(text):
        if vocabulary is not None:
            vocabulary.add(text[at : at + 1])
        stop = at + 1
        while stop < min(len(text), at + TOGETHER) and not (vocabulary and vocabulary.grows_by(text[stop])):
            stop += 1
        yield slice(at, stop)
        at = stop
