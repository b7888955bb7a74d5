"""Hugging Face's schedule of the draft length."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.base import LengthRule
from spec_envs.agents.settings import Natural


class ScheduleAgent(LengthRule):
    """Drafts two tokens more after a chain that was accepted whole, one less after any other. This is
    ``num_assistant_tokens_schedule="heuristic"`` of transformers (Gante 2023, "Assisted Generation"); it needs nothing
    but the number of accepted tokens.
    """

    class Settings(LengthRule.Settings):
        k: Natural = Field(5, description="first length; 5 in transformers when the schedule was the default, 20 since")
        increase: Natural = Field(2, description="tokens that a whole accepted chain adds to the length")
        decrease: Natural = Field(1, description="tokens that any other chain takes from it")

    settings: Settings
    looks_at = ("last_k", "last_acceptance")

    def update(self, accepted: float, observation: np.ndarray) -> None:
        own = self.settings
        self.k = min(self.k + own.increase, self.k_max) if accepted == 1 else max(1, self.k - own.decrease)

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "k": trial.suggest_int("k", 1, 8),
            "increase": trial.suggest_int("increase", 1, 4),
            "decrease": trial.suggest_int("decrease", 1, 4),
        }
