"""Hugging Face's confidence threshold."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.rules.base import StopRule
from spec_envs.controls.base import Control


class ConfidenceAgent(StopRule):
    """Stops after a token to which the draft model gave less than a threshold (``assistant_confidence_threshold`` of
    transformers, 0.4 there; Mamou et al. 2024, arXiv 2405.04304).

    Args:
        threshold: least probability at which drafting continues.
        cumulative: compare the product of the chain's probabilities instead of the last one.
        copy_threshold: as of ``StopRule``.
    """

    looks_at = ("drafted", "probability", "path", "free")

    def __init__(self, control: Control, threshold: float = 0.4, cumulative: bool = False, copy_threshold: float = 0.1):
        super().__init__(control, copy_threshold)
        self.threshold, self.entry = threshold, "path" if cumulative else "probability"

    def stops(self, observation: np.ndarray) -> bool:
        return self.read(observation, self.entry) < self.threshold

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "threshold": trial.suggest_float("threshold", 0.02, 0.98),
            "cumulative": trial.suggest_categorical("cumulative", [False, True]),
            **StopRule.space(trial),
        }
