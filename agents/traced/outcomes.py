"""The outcomes of plans as probabilities, to which a network is fitted by cross-entropy; they are its optimum."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from spec_envs.controls.plans import Plans, Prices

CERTAIN = 40.0  # log-odds of what has already happened
COPIES = 0.3  # weight of whether a token is a copy, beside that of whether it is right


class Outcomes(Protocol):
    """Turns the log-odds that a network returns into the worth of each plan.

    Attributes:
        outputs: how many log-odds the network returns.
    """

    outputs: int

    def loss(self, predicted: Tensor, accepted: Tensor, forwards: Tensor, weight: Tensor) -> Tensor:
        """Return the cross-entropy of log-odds ``[n, levels, outputs]`` and what happened. Deeper levels weigh less,
        since they are reached less often.

        Args:
            accepted, forwards: of ``Lessons``, ``[n, plans]``.
            weight: of each lesson, ``[n, 1, 1]``.
        """
        ...

    def price(self, pace: float, prices: Prices, caught: float, verified: float) -> None:
        """Set the worth of a second in tokens, and the prices of the plans.

        Args:
            caught, verified: of ``Lessons``.
        """
        ...

    def worth(self, predicted: np.ndarray, level: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Return the tokens, each worth its ``cost`` ``[n, 1]``, less what the seconds to come are worth, ``[n, plans]``,
        given log-odds ``[n, outputs]`` at those levels: up to a number that is the same for all plans that are open, and
        −inf for the others."""
        ...


def outcomes_of(plans: Plans) -> Outcomes:
    """Return the outcomes of a control's plans."""
    return ChainOutcomes(plans) if plans.chain else TreeOutcomes(plans)


class TreeOutcomes:
    """Predicts, for each plan, the share accepted of the tokens that it could accept (a fractional logit, Papke &
    Wooldridge 1996)."""

    def __init__(self, plans: Plans):
        self.outputs = len(plans.sizes)
        self.most = np.maximum(1, plans.longest).astype(np.float32)
        level, opened = np.arange(plans.levels), plans.open(np.arange(plans.levels))
        self.weights = torch.from_numpy((opened / (1.0 + level[:, None]) * self.most).astype(np.float32))
        self.ahead = np.maximum(0, plans.sizes - level[:, None]) if plans.stepwise else np.zeros((1, self.outputs))
        self.closed = np.where(opened, 0.0, np.inf)

    def loss(self, predicted: Tensor, accepted: Tensor, forwards: Tensor, weight: Tensor) -> Tensor:
        share = (accepted / torch.from_numpy(self.most))[:, None].expand_as(predicted)
        return binary_cross_entropy_with_logits(predicted, share, weight * self.weights) / self.weights.mean()

    def price(self, pace: float, prices: Prices, caught: float, verified: float) -> None:
        self.paid = (pace * (self.ahead * prices.forward + prices.verification) + self.closed).astype(np.float32)

    def worth(self, predicted: np.ndarray, level: np.ndarray, cost: np.ndarray) -> np.ndarray:
        worth: np.ndarray = cost * self.most * expit(predicted) - self.paid[level]
        return worth


class ChainOutcomes:
    """Predicts hazards, as in the discrete analysis of survival: that all tokens drafted so far are right, that each
    further one is right if those before it are, and that each further one is a copy, which takes no forward. Alternatives
    are weighed by their means: where a token that is no copy is wrong, one of those beside it may be right."""

    def __init__(self, plans: Plans):
        longest = len(plans.sizes) - 1
        self.outputs = 1 + 2 * longest
        level, token = np.arange(plans.levels)[:, None], np.arange(1, longest + 1)
        known = token <= level
        self.settled = CERTAIN * np.concatenate([level == 0, known, known], 1, dtype=np.float32)
        self.weights = torch.from_numpy((1 / (1.0 + level)).astype(np.float32))
        self.level, self.token = torch.from_numpy(level), torch.from_numpy(token)
        self.closed = np.where(plans.open(level[:, 0]), 0.0, np.inf)

    def loss(self, predicted: Tensor, accepted: Tensor, forwards: Tensor, weight: Tensor) -> Tensor:
        longest = accepted[:, -1:, None]  # all that is right of the longest chain
        further = self.token > self.level
        happened = torch.cat(
            [
                (longest >= self.level).float(),
                (longest >= self.token).float().expand(-1, len(self.level), -1),
                1 - forwards.diff(dim=1)[:, None].expand(-1, len(self.level), -1),
            ],
            2,
        )
        counts = torch.cat(
            [
                (self.level > 0).float().expand(len(longest), -1, -1),
                ((longest >= self.token - 1) & further).float(),
                COPIES * further.float().expand(len(longest), -1, -1),
            ],
            2,
        )
        return binary_cross_entropy_with_logits(predicted, happened, weight * counts * self.weights)

    def price(self, pace: float, prices: Prices, caught: float, verified: float) -> None:
        self.caught, own = np.float32(caught), prices.forward + verified * prices.alternative
        self.saved = np.float32(pace * own)  # by a copy
        sizes = np.arange(len(prices.verification))
        self.paid = (pace * (sizes * own + prices.verification) + self.closed).astype(np.float32)

    def worth(self, predicted: np.ndarray, level: np.ndarray, cost: np.ndarray) -> np.ndarray:
        chance, plans = expit(predicted + self.settled[level]), self.paid.shape[1]
        right, copied = chance[:, :plans].cumprod(1), chance[:, plans:]
        emitted = right.copy()  # first that all is right so far, which all plans have in common
        emitted[:, 1:] += (right[:, :-1] - right[:, 1:]) * (1 - copied) * self.caught
        gained = cost * emitted
        gained[:, 1:] += self.saved * copied
        worth: np.ndarray = gained.cumsum(1) - self.paid[level]
        return worth
