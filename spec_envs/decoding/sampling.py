"""Sampling distributions: of the target, by temperature and nucleus, and of a drafter, whole or cut to be sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from spec_envs.checked import check_number

LEAST = 1e-6  # of a temperature that is not 0: logits over a smaller one overflow


def check_sampling(temperature: Any, top_p: Any) -> None:
    """Refuse settings that no distribution follows from.

    Raises:
        ValueError: a temperature or a ``top_p`` out of its range, or not a number.
    """
    check_number("temperature", temperature, warm, WARM)
    check_number("top_p", top_p, lambda value: 0 < value <= 1, "a number in (0, 1]")


def warm(temperature: float) -> bool:
    """Whether tokens can be drawn at a temperature, or chosen greedily."""
    return temperature == 0 or temperature >= LEAST


WARM = f"0 (greedy) or {LEAST:g} or more"


def probabilities(logits: Tensor, temperature: float, top_p: float = 1.0) -> np.ndarray:
    """The distribution ``[vocab]`` (float64) that tokens are drawn from: the smallest set of mass ``top_p`` of the
    softmax of ``logits / temperature``."""
    p = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        p[p < (1 - top_p) / len(p)] = 0.0  # together less than what is dropped; a whole vocabulary takes long to sort
        [left] = p.nonzero(as_tuple=True)
        ordered, index = p[left].sort(descending=True, stable=True)
        p[left[index[ordered.cumsum(-1) - ordered >= top_p]]] = 0.0
        p /= p.sum()
    return p.cpu().numpy()


def inverse_cdf(weights: np.ndarray, u: float) -> int:
    """The index drawn by ``u`` in [0, 1) from unnormalised ``weights`` ``[n]``; never one of weight 0."""
    below = np.cumsum(weights)
    index = int(np.searchsorted(below, u * below[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))


@dataclass(frozen=True)
class Proposal:
    """The distribution that a drafted token is drawn from.

    Attributes:
        ids: tokens that it may be, ``[n]``, distinct.
        weights: in proportion to their probabilities, ``[n]``, positive and of any float type: what counts is their
            value in float64, so that both ends of a network that hold the same weights hold the same distribution.
    """

    ids: np.ndarray
    weights: np.ndarray

    @classmethod
    def certain(cls, token: int) -> Proposal:
        """All on one token."""
        return cls(np.array([token]), np.ones(1))

    def dense(self, vocab: int) -> np.ndarray:
        """Probabilities ``[vocab]`` (float64)."""
        q = np.zeros(vocab)
        weights = self.weights.astype(np.float64)
        q[self.ids] = weights / weights.sum()
        return q

    def probability(self, token: int) -> float:
        """Of one token."""
        weights = self.weights.astype(np.float64)
        return float(weights[self.ids == token].sum() / weights.sum())

    def draw(self, u: float) -> int:
        """The token drawn by ``u`` in [0, 1)."""
        return int(self.ids[inverse_cdf(self.weights.astype(np.float64), u)])

    def truncated(self, k: int) -> Proposal:
        """Its ``k`` most probable tokens (of equal ones those that stand first) with weights in float16, the largest
        being 1: what is sent of it over a network, and therefore to be drawn from. Weights that float16 rounds to 0 are
        left out."""
        best = np.argsort(-self.weights, kind="stable")[:k]
        weights = (self.weights[best] / self.weights[best[0]]).astype(np.float16)
        kept = weights > 0
        return Proposal(self.ids[best[kept]], weights[kept])
