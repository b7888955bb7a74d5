"""SVIP for trees: the drafter's entropy after the best node decides when to stop."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.rules.tree_base import GrowthRule
from spec_envs.agents.settings import Amount
from spec_envs.controls.observation.recorded import ENTROPY_UNIT


class SvipTreeAgent(GrowthRule):
    """Stops growing the tree where √H is above a threshold, H the entropy in nats of the distribution that the best node
    of the last level is from. It applies the rule of Zhang et al. 2024 (SVIP, arXiv 2411.18462) for chains to trees.
    """

    class Settings(GrowthRule.Settings):
        threshold: Amount = Field(0.6, description="largest √H at which the tree grows, H in nats")

    settings: Settings
    problems = ("tree",)
    looks_at = ("entropy", "expansions")

    def stops(self, observation: np.ndarray) -> bool:
        return bool(np.sqrt(ENTROPY_UNIT * self.read(observation, "entropy")) > self.settings.threshold)

    def space(self, trial: Any) -> dict[str, Any]:
        return {"threshold": trial.suggest_float("threshold", 0.1, 2.5), **super().space(trial)}
