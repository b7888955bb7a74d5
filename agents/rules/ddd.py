"""Dynamic Depth Decoding: the beam's probability decides when to stop."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.tree_base import GrowthRule
from spec_envs.agents.settings import Amount


class DddAgent(GrowthRule):
    """Grows the tree while the summed path probability of its beam, the nodes that the next expansion would feed, is at
    least a threshold: Σ p(node) ≥ ``threshold`` (Brown et al. 2024, Dynamic Depth Decoding, arXiv 2409.00142).
    The sum is what the drafter expects the next level to be reached with.
    """

    class Settings(GrowthRule.Settings):
        threshold: Amount = Field(0.4, description="least sum at which the tree grows")

    settings: Settings
    problems = ("depth", "tree")
    looks_at = ("frontier", "expansions")

    def stops(self, observation: np.ndarray) -> bool:
        return bool(self.numbers(observation, "frontier").sum() < self.settings.threshold)

    def space(self, trial: Any) -> dict[str, Any]:
        return {"threshold": trial.suggest_float("threshold", 0.02, 1.0), **super().space(trial)}
