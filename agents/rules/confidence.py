"""Hugging Face's confidence threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.base import StopRule
from spec_envs.agents.settings import Share
from spec_envs.controls.base import Control


class ConfidenceAgent(StopRule):
    """Stops drafting after a token whose probability q is below a threshold, q being the draft model's own: it continues
    while q ≥ ``threshold`` (``assistant_confidence_threshold`` of transformers, 0.4 there; Mamou et al. 2024, DISCO,
    arXiv 2405.04304). With ``cumulative`` the product of all probabilities of the chain is compared instead, which is
    the drafter's own estimate that all of it is accepted.

    It has one number to tune, and costs next to no time. A threshold that was tuned for the pair of models is hard to
    beat.
    """

    class Settings(StopRule.Settings):
        threshold: Share = Field(0.4, description="least probability at which drafting continues")
        cumulative: bool = Field(
            False, description="compare the product of the chain's probabilities instead of the last one"
        )

    settings: Settings
    looks_at = ("drafted", "probability", "path", "free")

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.entry = "path" if self.settings.cumulative else "probability"

    def stops(self, observation: np.ndarray) -> bool:
        return self.read(observation, self.entry) < self.settings.threshold

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "threshold": trial.suggest_float("threshold", 0.02, 0.98),
            "cumulative": trial.suggest_categorical("cumulative", [False, True]),
            **StopRule.space(trial),
        }
