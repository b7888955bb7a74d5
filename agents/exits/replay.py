"""The verified rows of texts that an agent at an early exit has seen, and a memory of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.exits.split import SplitVerifier

UNDRAFTED = -1  # in place of a token, at a row after which nothing was drafted


@dataclass(frozen=True)
class Segment:
    """Rows of one text in order, up to and including the first rejected draft of each cycle: later drafts were never
    verified, and are not here.

    Attributes:
        ids: the text up to its last row, ``[m]``.
        places: where in it the rows are, ``[n]``; a row is what a token is drafted from.
        exits: their exit states, ``[n, hidden]``.
        finals: their hidden states after the last layer, ``[n, hidden]``, from which the head gives the verifier's
            logits.
        drafted: the token drafted after each, ``[n]``; ``UNDRAFTED`` where the target added one on its own.
        rewards: 1 where the verifier accepted it, else 0, ``[n]``.
        confidences: the probability that the verifier gave it, ``[n]``.
        behaviour: the log-probability with which it was drafted, ``[n]``.
    """

    ids: Tensor
    places: Tensor
    exits: Tensor
    finals: Tensor
    drafted: Tensor
    rewards: Tensor
    confidences: Tensor
    behaviour: Tensor

    def __len__(self) -> int:
        return len(self.places)


def verified_rows(
    verifier: SplitVerifier,
    text: Sequence[int],
    positions: Sequence[dict[str, Any]],
    behaviour: Sequence[float],
    n: int,
) -> Segment:
    """Return the rows of the verifier's last call, one for each of the ``n`` tokens that it emitted.

    Args:
        text: up to the last row.
        positions: its verified drafts; see ``SpecDVI-v0``.
        behaviour: the log-probabilities with which these were drafted, as far as they are known.
    """
    device = verifier.device

    def padded(values: Iterable[Any], filler: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([*values, *[filler] * n][:n], dtype=dtype, device=device)

    return Segment(
        ids=torch.tensor(text, device=device),
        places=torch.arange(len(text) - n, len(text), device=device),
        exits=verifier.features[:n].float().clone(),
        finals=verifier.finals[:n].clone(),
        drafted=padded((p["token"] for p in positions), UNDRAFTED, torch.int64),
        rewards=padded((float(p["accepted"]) for p in positions), 0.0, torch.float32),
        confidences=padded((p["confidence"] for p in positions), 0.0, torch.float32),
        behaviour=padded(behaviour, 0.0, torch.float32),
    )


class Replay:
    """The latest segments, of at most ``size`` rows together."""

    def __init__(self, size: int):
        self.size = size
        self.segments: list[Segment] = []

    def add(self, segments: Sequence[Segment]) -> None:
        """Remember segments, and forget the oldest ones."""
        self.segments += segments
        rows = sum(map(len, self.segments))
        while rows > self.size and len(self.segments) > 1:
            rows -= len(self.segments.pop(0))

    def sample(self, rows: int, rng: np.random.Generator) -> list[Segment]:
        """Return different segments that have ``rows`` rows together, or all there are."""
        chosen: list[Segment] = []
        for i in rng.permutation(len(self.segments)):
            if sum(map(len, chosen)) >= rows:
                break
            chosen.append(self.segments[i])
        return chosen


def packed(segments: Sequence[Segment]) -> list[dict[str, Tensor]]:
    """Return segments as tensors by name, for a checkpoint."""
    return [{field.name: getattr(segment, field.name) for field in fields(Segment)} for segment in segments]


def unpacked(state: Sequence[dict[str, Any]], device: torch.device) -> list[Segment]:
    """Return the segments that ``packed`` turned into tensors."""
    return [Segment(**{name: tensor.to(device) for name, tensor in tensors.items()}) for tensors in state]


def joined(segments: Sequence[Segment], name: str) -> Tensor:
    """Return one attribute of several segments, concatenated."""
    return torch.cat([getattr(segment, name) for segment in segments])


def merged(rows: Sequence[Segment]) -> Segment:
    """Return consecutive rows of one text as one segment."""
    columns = {name: joined(rows, name) for name in Segment.__dataclass_fields__ if name != "ids"}
    return Segment(ids=rows[-1].ids, **columns)
