"""Batches of recorded conversations, on which a drafter is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spec_envs.experiments.drafters.recording import Example


@dataclass(frozen=True)
class Batch:
    """Conversations one after the other, without padding. The row of token t of a text predicts token t + 1 or t + 2.

    Attributes:
        ids: token ids ``[n]``.
        features: hidden states of the captured layers ``[n, 3·hidden]``.
        final: normed hidden states after the last layer ``[n, hidden]``.
        lengths: numbers of tokens of the texts.
        answers: positions where their answers begin.
    """

    ids: Tensor
    features: Tensor
    final: Tensor
    lengths: Sequence[int]
    answers: Sequence[int]

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device, features: bool = True) -> Batch:
        """Return the batch of some conversations; ``features`` says whether the drafter reads them."""
        return cls(
            torch.cat([example.ids for example in examples]).to(device),
            torch.cat([example.features.restored(device) for example in examples]) if features else torch.empty(0),
            torch.cat([example.final.restored(device) for example in examples]),
            [len(example.ids) for example in examples],
            [example.answer for example in examples],
        )

    @cached_property
    def text(self) -> Tensor:
        """Number of the text that each token belongs to, ``[n]``."""
        texts = torch.arange(len(self.lengths))
        return texts.repeat_interleave(torch.tensor(self.lengths)).to(self.ids.device)

    @cached_property
    def position(self) -> Tensor:
        """Position of each token in its text, ``[n]``."""
        return torch.cat([torch.arange(length) for length in self.lengths]).to(self.ids.device)

    @cached_property
    def left(self) -> Tensor:
        """Number of tokens that follow each token in its text, ``[n]``."""
        return torch.cat([torch.arange(length - 1, -1, -1) for length in self.lengths]).to(self.ids.device)

    @cached_property
    def inside(self) -> Tensor:
        """True for the tokens of an answer and the last token before it, ``[n]``. From the latter on a drafter is used:
        the target itself makes the first token of an answer."""
        begins = torch.tensor(self.answers, device=self.ids.device)
        return self.position >= begins[self.text] - 1

    @cached_property
    def first(self) -> Tensor:
        """Position of the first occurrence of each token in its text, ``[n]``. From there on the drafter's vocabulary
        has the token."""
        found = []
        for ids in self.ids.split(list(self.lengths)):
            _, inverse = ids.unique(return_inverse=True)
            places = torch.arange(len(ids), device=ids.device)
            firsts = torch.full((len(ids),), len(ids), device=ids.device).scatter_reduce(0, inverse, places, "amin")
            found.append(firsts[inverse])
        return torch.cat(found)

    def drafting(self, step: int) -> Tensor:
        """Return which rows draft a token of the answer at step ``step`` of a chain, ``[n]`` (bool): token t + 2 + step
        for the row of token t."""
        return self.inside & (self.left >= 2 + step)

    def trained(self, step: int, prompts: float, generator: torch.Generator) -> Tensor:
        """Return the rows that are trained at a step, as ascending indices: all that draft, and a share ``prompts`` of
        those before the answers."""
        rows = self.drafting(step)
        rows[sampled(~self.inside & (self.left >= 2 + step), prompts, generator)] = True
        return rows.nonzero()[:, 0]


def sampled(rows: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a random share of the rows that are True in ``[n]`` (bool), as ascending indices."""
    places = rows.nonzero()[:, 0]
    drawn = torch.randperm(len(places), generator=generator, device=rows.device)
    return places[drawn[: round(share * len(places))]].sort().values


def grouped(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return the indices of ``lengths``, in order, in groups that hold at most ``tokens`` tokens each, or one text."""
    groups: list[list[int]] = [[]]
    held = 0
    for i, length in enumerate(lengths):
        if groups[-1] and held + length > tokens:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += length
    return groups


def parted(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Return the indices of texts in at most ``parts`` parts of about as many tokens, the longest text first."""
    found: list[list[int]] = [[] for _ in range(min(parts, len(lengths)))]
    held = [0] * len(found)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = held.index(min(held))
        found[least].append(i)
        held[least] += lengths[i]
    return found
