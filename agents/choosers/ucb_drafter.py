"""A bandit over drafters and sizes."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.choosers.base import PricedDrafterRule
from spec_envs.agents.rules.bandit import Bandit, BanditSettings
from spec_envs.controls.base import Control


class UcbDrafterAgent(PricedDrafterRule):
    """Chooses drafter and size as a discounted bandit (Garivier and Moulines 2011, arXiv 0805.3415), as ``ucb`` chooses
    K: each pair is worth its tokens over the seconds of a cycle under the cost table. Only the arm that was chosen is
    learned from, whatever else the verified text shows. It learns while it is deployed.
    """

    Settings = BanditSettings
    settings: BanditSettings
    remembers = ("bandit",)
    looks_at = ("last_accepted",)

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.bandit = Bandit(np.ones(len(self.sizes)), self.settings.exploration, self.settings.discount)

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        if not start:
            self.bandit.record(1 + self.accepted(observation))
        self.bandit.prices = self.prices
        return self.bandit.choose(1 + self.sizes), state

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return BanditSettings.space(trial)
