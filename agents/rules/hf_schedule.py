"""Hugging Face's schedule of the draft length."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.rules.base import LengthRule
from spec_envs.controls.base import Control


class ScheduleAgent(LengthRule):
    """Drafts two tokens more after a chain that was accepted whole, one less after any other
    (``num_assistant_tokens_schedule="heuristic"`` of transformers; Gante 2023, "Assisted Generation").

    Args:
        k: first length; 5 in transformers when the schedule was the default, 20 since.
        increase, decrease: change of the length, in tokens.
    """

    looks_at = ("last_k", "last_acceptance")

    def __init__(self, control: Control, k: int = 5, increase: int = 2, decrease: int = 1):
        super().__init__(control, k)
        self.increase, self.decrease = increase, decrease

    def update(self, accepted: float, observation: np.ndarray) -> None:
        self.k = min(self.k + self.increase, self.k_max) if accepted == 1 else max(1, self.k - self.decrease)

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "k": trial.suggest_int("k", 1, 8),
            "increase": trial.suggest_int("increase", 1, 4),
            "decrease": trial.suggest_int("decrease", 1, 4),
        }
