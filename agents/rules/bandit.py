"""Discounted UCB over arms of different prices."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.settings import AgentSettings, Amount, Share


class BanditSettings(AgentSettings):
    """The hyper-parameters of a bandit."""

    exploration: Amount = Field(
        0.05, description="weight of the bonus for arms tried little lately, in units of the most tokens of a cycle"
    )
    discount: Share = Field(0.999, description="weight of an observation one decision earlier")

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        """Return hyper-parameters to try, suggested by an Optuna trial."""
        return {
            "exploration": trial.suggest_float("exploration", 0.005, 0.5, log=True),
            "discount": trial.suggest_categorical("discount", [0.97, 0.99, 0.995, 0.999, 1.0]),
        }


class Bandit:
    """Each arm is worth its mean tokens per unit of its price, plus a bonus where it was tried little lately (Garivier
    and Moulines 2011, arXiv 0805.3415).

    Args:
        prices: price of a cycle by arm.
        exploration: weight of the bonus, in units of the most tokens that an arm can bring.
        discount: weight of an observation one decision earlier.
    """

    def __init__(self, prices: np.ndarray, exploration: float, discount: float):
        self.prices, self.exploration, self.discount = prices, exploration, discount
        self.tries, self.tokens = np.zeros(len(prices)), np.zeros(len(prices))
        self.chosen = 0

    def record(self, tokens: float) -> None:
        """Note the tokens that the last chosen arm emitted."""
        self.tries *= self.discount
        self.tokens *= self.discount
        self.tries[self.chosen] += 1
        self.tokens[self.chosen] += tokens

    def choose(self, most: np.ndarray) -> int:
        """Return the arm to choose.

        Args:
            most: tokens that each arm can bring at most.
        """
        tried = np.maximum(self.tries, 1e-9)
        bonus = np.sqrt(np.log(max(self.tries.sum(), np.e)) / tried)
        worth = (self.tokens / tried + self.exploration * most * bonus) / self.prices
        self.chosen = int(np.argmax(np.where(self.tries == 0, np.inf, worth)))
        return self.chosen
