"""Uniformly random actions: the baseline without decisions."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.agents.rules.base import Rule
from spec_envs.agents.settings import SeededSettings
from spec_envs.controls.base import Control


class RandomAgent(Rule):
    """Takes every action with the same probability, whatever it observes. An agent that has learned something is faster
    than this one.
    """

    Settings = SeededSettings
    settings: SeededSettings
    looks_at = ()

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.actions = control.action_space
        self.actions.seed(self.settings.seed)

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        return self.actions.sample(), state
