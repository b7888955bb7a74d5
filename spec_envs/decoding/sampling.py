"""Sampling: the target's distribution at a temperature and top_p, and a drafter's proposals, whole or cut for a
network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from spec_envs.checked import check_number

LEAST = 1e-6  # smallest positive temperature; logits divided by a smaller one overflow


def check_sampling(temperature: Any, top_p: Any) -> None:
    """Check the settings of a sampling distribution.

    Raises:
        ValueError: ``temperature`` or ``top_p`` is not a number or is out of range.
    """
    check_number("temperature", temperature, warm, WARM)
    check_number("top_p", top_p, lambda value: 0 < value <= 1, "a number in (0, 1]")


def warm(temperature: float) -> bool:
    """Return whether a temperature is 0 (greedy) or large enough to draw tokens."""
    return temperature == 0 or temperature >= LEAST


WARM = f"0 (greedy) or {LEAST:g} or more"


def probabilities(logits: Tensor, temperature: float, top_p: float = 1.0) -> np.ndarray:
    """Return the distribution ``[vocab]`` (float64) of the next token.

    It is the softmax of ``logits / temperature``, cut to the smallest set of tokens with a mass of ``top_p`` or more
    (nucleus sampling, arXiv 1904.09751) and normalised.
    """
    p = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        p[p < (1 - top_p) / len(p)] = 0.0  # always outside the nucleus; sorting a whole vocabulary takes long
        [left] = p.nonzero(as_tuple=True)
        ordered, index = p[left].sort(descending=True, stable=True)
        p[left[index[ordered.cumsum(-1) - ordered >= top_p]]] = 0.0
        p /= p.sum()
    return p.cpu().numpy()


def inverse_cdf(weights: np.ndarray, u: float) -> int:
    """Return the index that ``u`` in [0, 1) draws from unnormalised ``weights`` ``[n]``; never one of weight 0."""
    below = np.cumsum(weights)
    index = int(np.searchsorted(below, u * below[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))


@dataclass(frozen=True)
class Proposal:
    """The distribution from which a drafted token is drawn.

    Attributes:
        ids: the possible tokens ``[n]``, distinct.
        weights: positive numbers ``[n]`` in proportion to the probabilities, of any float type. They are used in
            float64, so that both ends of a network that hold the same weights hold the same distribution.
    """

    ids: np.ndarray
    weights: np.ndarray

    @classmethod
    def certain(cls, token: int) -> Proposal:
        """Return the distribution with all its mass on ``token``."""
        return cls(np.array([token]), np.ones(1))

    def dense(self, vocab: int) -> np.ndarray:
        """Return the probabilities ``[vocab]`` (float64) of all tokens."""
        q = np.zeros(vocab)
        weights = self.weights.astype(np.float64)
        q[self.ids] = weights / weights.sum()
        return q

    def probability(self, token: int) -> float:
        """Return the probability of ``token``."""
        weights = self.weights.astype(np.float64)
        return float(weights[self.ids == token].sum() / weights.sum())

    def draw(self, u: float) -> int:
        """Return the token that ``u`` in [0, 1) draws."""
        return int(self.ids[inverse_cdf(self.weights.astype(np.float64), u)])

    def best(self, count: int, but: int) -> np.ndarray:
        """Return the most probable tokens other than ``but``, up to ``count`` of them; none of probability 0."""
        weights = np.where(self.ids == but, 0, self.weights)
        largest = np.argpartition(-weights, min(count, len(weights) - 1))[:count]
        ordered = largest[np.argsort(-weights[largest], kind="stable")]
        found: np.ndarray = self.ids[ordered[weights[ordered] > 0]]
        return found

    def truncated(self, k: int) -> Proposal:
        """Return the distribution over the ``k`` most probable tokens, as it is sent over a network.

        The weights are float16, the largest being 1; tokens whose weight rounds to 0 are left out, and of equally
        probable ones those that come first are kept. A drafter whose proposals are sent draws from this distribution,
        since the target corrects for the one that it receives.
        """
        best = np.argsort(-self.weights, kind="stable")[:k]
        weights = (self.weights[best] / self.weights[best[0]]).astype(np.float16)
        kept = weights > 0
        return Proposal(self.ids[best[kept]], weights[kept])
