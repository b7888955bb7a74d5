"""Hedge over drafters and sizes, with all that a cycle has shown."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.choosers.base import PricedDrafterRule
from spec_envs.agents.settings import Amount, Count, SeededSettings, Share
from spec_envs.controls.base import Control


class HedgeAgent(PricedDrafterRule):
    """Chooses drafter and size by exponential weights (Freund and Schapire 1997, Hedge, doi 10.1006/jcss.1997.1504).

    After every cycle the weight of an arm is multiplied by exp(``rate`` · g), where g = 1 + A − ``pace`` · T is the
    gain that the arm would have had: the tokens that it would have emitted, less what its price T, in plain steps, is
    worth. One verified text scores more than the arm that was chosen: the plain step always, and a drafter whose right
    tokens are known under each of its sizes (what it would have had right after the end of a draft or of the verified
    text is not known, and counts as wrong). The other arms keep their weights. Before that, all log-weights are
    multiplied by ``memory``, so that old gains are forgotten.

    How right a copy is depends on how much of the text matches its source. So there are separate weights for ranges of
    the longest match, which ``matches`` parts; without any it is Hedge as published. The arm of the highest weight is
    chosen where the agent is asked to be deterministic, as it is while a text is decoded; otherwise the arm is drawn
    from the weights. It learns while it is deployed.

    Raises:
        ValueError: ``matches`` do not ascend.
    """

    class Settings(SeededSettings):
        rate: Amount = Field(0.3, le=100.0, description="learning rate")
        pace: Amount = Field(1.2, le=100.0, description="tokens that the time of a plain step is worth")
        memory: Share = Field(0.98, description="factor of the log-weights from decision to decision")
        matches: tuple[Count, ...] = Field(
            (1, 2, 4), description="longest matches, in tokens, from which on the next set of weights is used"
        )

    settings: Settings
    remembers = ("weights", "rng", "context")
    looks_at = ("match", "scores", "known")

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        matches = self.settings.matches
        if list(matches) != sorted(set(matches)):
            raise ValueError(f"matches is {list(matches)}; expected ascending numbers of tokens")
        self.weights = np.zeros((len(matches) + 1, len(self.sizes)))  # their logarithms
        self.rng = np.random.default_rng(self.settings.seed)
        self.context = 0

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        if not start:
            self.weights *= self.settings.memory
            gains, known = self.gains(observation)
            self.weights[self.context] += np.where(known, self.settings.rate * gains, 0.0)
        longest = self.matches(observation).max(initial=0)
        self.context = int(np.searchsorted(self.settings.matches, longest, "right"))
        weights = self.weights[self.context]
        if deterministic:
            return int(weights.argmax()), state
        chances = np.exp(weights - weights.max())
        return int(self.rng.choice(len(chances), p=chances / chances.sum())), state

    def gains(self, observation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the gain of every arm in the last cycle ``[arms]``, and True where it is known."""
        drafts = self.drafter >= 0
        right = np.rint(self.numbers(observation, "scores") * self.largest)[self.drafter]
        known = np.where(drafts, self.numbers(observation, "known")[self.drafter] > 0, True)
        tokens = 1 + np.where(drafts, np.minimum(right, self.sizes), 0)
        return tokens - self.settings.pace * self.prices, known

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "rate": trial.suggest_float("rate", 0.02, 2.0, log=True),
            "pace": trial.suggest_float("pace", 0.8, 2.0),
            "memory": trial.suggest_categorical("memory", [0.8, 0.9, 0.95, 0.98, 0.995, 1.0]),
        }
