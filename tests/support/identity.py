"""The cheapest problem that shows whether an algorithm learns."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Identity(gym.Env):
    """Ten decisions per episode; the right action is 1 if the first number is above one half, else 0.

    Args:
        observation_space: numbers from 0 to 1.
        action_space: two actions or more.
    """

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Discrete):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.left = 10
        return self._draw(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward = float(int(action) == int(self.seen[0] > 0.5))
        self.left -= 1
        return self._draw(), reward, self.left == 0, False, {}

    def _draw(self) -> np.ndarray:
        self.seen = self.np_random.random(self.observation_space.shape).astype(np.float32)
        return self.seen
