"""Batches of recorded conversations, on which a drafter is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spec_envs.experiments.drafters.recording import Example


@dataclass
class Batch:
    """Conversations, padded on the right.

    Attributes:
        ids: token ids ``[B, T]``.
        features: hidden states of the captured layers ``[B, T, 3·hidden]``.
        final: normed hidden states after the last layer ``[B, T, hidden]``.
        lengths: numbers of tokens ``[B]``.
        answers: positions where the answers begin ``[B]``.
    """

    ids: Tensor
    features: Tensor
    final: Tensor
    lengths: Tensor
    answers: Tensor

    @classmethod
    def of(cls, examples: list[Example], device: torch.device) -> Batch:
        ids, features, final = (
            pad_sequence([getattr(e, name) for e in examples], batch_first=True).to(device)
            for name in ("ids", "features", "final")
        )
        lengths = torch.tensor([len(e.ids) for e in examples], device=device)
        answers = torch.tensor([e.answer for e in examples], device=device)
        return cls(ids, features, final, lengths, answers)


def drafted_rows(batch: Batch, step: int, within_answer: bool = True) -> Tensor:
    """Return the rows ``[B, T]`` (bool) from which step ``step`` of a chain still drafts a token of the text.

    Args:
        within_answer: only rows that draft tokens of the answer.
    """
    row = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    first = batch.answers[:, None] - 1 if within_answer else 0
    return (row >= first) & (row + 2 + step < batch.lengths[:, None])


def first_occurrence(ids: Tensor) -> Tensor:
    """Return the position of the first occurrence of each token ``[B, T]`` in its text. From there on the drafter's
    vocabulary has the token."""
    return (ids[:, :, None] == ids[:, None, :]).byte().argmax(-1)
