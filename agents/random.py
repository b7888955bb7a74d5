"""Uniformly random actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spec_envs.controls.base import Control


class RandomAgent:
    """Every action with the same probability, whatever is observed."""

    decision_seconds = 0.0

    def __init__(self, control: Control, seed: int = 0):
        self.actions = control.action_space
        self.actions.seed(seed)

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        return self.actions.sample(), state

    def learn(self, total_timesteps: int) -> RandomAgent:
        """Nothing to learn."""
        return self

    def save(self, folder: Path) -> None:
        """Nothing to save."""

    def load(self, folder: Path) -> None:
        """Nothing to load."""
