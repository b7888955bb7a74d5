"""The tokens that a draft model drafts from in every text: a whole vocabulary costs more than it brings (FR-Spec, arXiv
2502.14856).

Tokenizers number their tokens in the order in which they were merged, the most frequent pairs first, so that the first
ids are the frequent tokens, without any counting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.drafters.names import ShortlistSize
from spec_envs.decoding.model.transformer import Transformer

LEAST, SHARE = 8192, 4  # a shortlist has at least so many tokens, and one of so many of the vocabulary


@dataclass(frozen=True)
class Shortlist:
    """The tokens of a reduced head.

    Attributes:
        ids: target ids of the head's outputs ``[n]``.
        head: the norm and the output rows, from hidden states to the logits of ``ids``.
        rows: returns output rows ``[m, hidden]`` of further ids ``[m]``, for tokens of the text.
        known: how many ids have output rows; ids from there on are padding of the target's vocabulary.
    """

    ids: np.ndarray
    head: Any
    rows: Callable[[Tensor], Tensor]
    known: int


def size_of(asked: ShortlistSize, vocab: int) -> int:
    """Return the size of a shortlist of a vocabulary; ``"auto"`` is a quarter of it, but at least ``LEAST``."""
    if asked == "auto":
        return max(LEAST, vocab // SHARE)
    return vocab if asked == "all" else asked


@functools.cache
def shortened(model: Transformer, vocab: int, size: int, ends: frozenset[int]) -> Shortlist:
    """Return the first ``size`` ids of a model and those of ``ends``, with their part of its head.

    It is made once for each model, since the rows are copied.

    Args:
        model: the draft model.
        vocab: ids from here on are not drafted.
        size: number of ids.
        ends: ids that end a text.
    """
    known = min(vocab, model.shape.vocab)
    ids = np.array(sorted({*range(min(size, known)), *(end for end in ends if end < known)}))
    weight = model.precision.cast(model.output_rows(torch.from_numpy(ids).to(model.device)), model.device)
    return Shortlist(ids, model.precision.modules.Head(weight, model.norm), model.output_rows, known)
