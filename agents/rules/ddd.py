"""Dynamic Depth Decoding: the beam's probability decides when to stop."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.rules.tree_base import GrowthRule
from spec_envs.controls.base import Control


class DddAgent(GrowthRule):
    """Grows the tree while the summed path probability of its beam, the nodes that the next expansion would feed, is at
    least a threshold (Brown et al. 2024, arXiv 2409.00142).

    Args:
        threshold: least sum at which the tree grows.
        budget: as of ``GrowthRule``.
    """

    plays = ("depth", "tree")
    looks_at = ("frontier", "expansions")

    def __init__(self, control: Control, threshold: float = 0.4, budget: int = 7):
        super().__init__(control, budget)
        self.threshold = threshold

    def stops(self, observation: np.ndarray) -> bool:
        return bool(self.numbers(observation, "frontier").sum() < self.threshold)

    def space(self, trial: Any) -> dict[str, Any]:
        return {"threshold": trial.suggest_float("threshold", 0.02, 1.0), **super().space(trial)}
