"""Recorded conversations as batches that a drafter is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spec_envs.experiments.drafters.recording import Example


@dataclass
class Batch:
    """Conversations padded on the right.

    ids ``[B, T]``, features ``[B, T, 3·hidden]``, final ``[B, T, hidden]``, lengths and answers ``[B]``.
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
    """Return the rows ``[B, T]`` (bool) at which a chain of this length is drafted inside the answer, or inside the
    whole text."""
    row = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    first = batch.answers[:, None] - 1 if within_answer else 0
    return (row >= first) & (row + 2 + step < batch.lengths[:, None])


def first_occurrence(ids: Tensor) -> Tensor:
    """Return where in its text each token ``[B, T]`` occurs first: from there on the drafter's vocabulary has it."""
    return (ids[:, :, None] == ids[:, None, :]).byte().argmax(-1)
