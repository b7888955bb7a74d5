"""A fixed order of drafters: copy where the text is being copied, else draft with a model."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.choosers.base import DrafterRule
from spec_envs.agents.settings import AgentSettings, Count
from spec_envs.controls.base import Control


class FixedOrderAgent(DrafterRule):
    """Asks drafters in a fixed order, as engines do: a copier where at least ``match`` tokens match the place that it
    would copy from, else one other drafter. Both draft one size.

    Raises:
        ValueError: ``copier`` is no setting of a copier, or ``otherwise`` none that the control offers.
    """

    class Settings(AgentSettings):
        copier: str = Field("lookup:4", description="setting of a drafter that copies")
        match: Count = Field(3, description="fewest matching tokens at which it is asked")
        otherwise: str = Field("plain", description="setting that is followed elsewhere")

    settings: Settings
    looks_at = ("match",)

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        own = self.settings
        if not self.copies:
            raise ValueError(
                f"no drafter of {', '.join(self.control.drafters)} copies alone; expected lookup or suffix among them"
            )
        for name, value, expected in (
            ("copier", own.copier, self.copies),
            ("otherwise", own.otherwise, self.arms),
        ):
            if value not in expected:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(expected)}")
        self.actions = (self.arms.index(own.copier), self.arms.index(own.otherwise))
        asked = self.drafter[self.actions[0]]
        self.place = sum(bool(name.copies) for name in self.names[:asked])  # among those whose matches are observed

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        copied, otherwise = self.actions
        return copied if self.matches(observation)[self.place] >= self.settings.match else otherwise, state

    def space(self, trial: Any) -> dict[str, Any]:
        return {
            "copier": trial.suggest_categorical("copier", self.copies),
            "match": trial.suggest_int("match", 1, 12),
            "otherwise": trial.suggest_categorical("otherwise", [s for s in self.arms if s not in self.copies]),
        }
