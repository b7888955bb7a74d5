"""The published selector of k behind Stable-Baselines3's ``predict``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from tqdm import tqdm

from agents.deciding import Deciding
from agents.rl_adapter import FILE, STATE, RLNetworkAdapter
from spec_envs.controls.base import Control
from spec_envs.controls.published_state import KS
from spec_envs.env import SpecEnv


class RLAdapterAgent(Deciding):
    """The published selector where it plays SpecTopK-v0.

    Args:
        control: SpecTopK-v0's with ``observation="rl_adapter"``.
        path: of a checkpoint to begin with; None begins with new networks.
        seed: of the networks, of exploration and of the training prompts.
        hyperparameters: of :class:`agents.rl_adapter.Settings`, by name.

    Attributes:
        adapter: the selector itself.
        decision_seconds: time of one decision, measured when the agent is made.

    Raises:
        ValueError: another control, an unknown hyper-parameter, or a checkpoint that cannot be read.
    """

    def __init__(self, control: Control, path: str | None = None, seed: int = 0, **hyperparameters: Any):
        shape, actions = control.observation_space.shape, control.action_space
        if shape != (STATE,) or actions != spaces.Discrete(len(KS)):
            raise ValueError(
                f"the observation has the shape {shape} and the actions are {actions}, but rl-adapter needs ({STATE},) and "
                f'Discrete({len(KS)}), which are those of SpecTopK-v0 with observation="rl_adapter"'
            )
        self.control, self.seed = control, seed
        self.adapter = RLNetworkAdapter({"path": None, "seed": seed, **hyperparameters})
        if path is not None:
            self.adapter.load(path)
        self.decision_seconds = self.measure()

    def measure(self) -> float:
        """Median seconds of a decision."""
        blank, timings = np.zeros(STATE, np.float32), []
        for _ in range(50):
            begin = time.perf_counter()
            self.predict(blank, deterministic=True)
            timings.append(time.perf_counter() - begin)
        return float(np.median(timings))

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """The action for one observation; unless ``deterministic``, a random one with probability ε."""
        return self.adapter.act(observation, training=not deterministic), state

    def record(
        self, observation: np.ndarray, action: int, reward: float, next_observation: np.ndarray, done: bool
    ) -> None:
        """Learn from what an action brought; see ``RLNetworkAdapter.record``."""
        self.adapter.record(observation, action, reward, next_observation, done)

    def learn(self, total_timesteps: int, env: gym.Env) -> Self:
        """Act and learn for ``total_timesteps`` steps."""
        observation, _ = env.reset(seed=self.seed + self.adapter.update_count)  # what goes on sees other prompts
        for _ in tqdm(range(total_timesteps), desc="learning k", unit="step"):
            action = self.adapter.act(observation, training=True)
            following, reward, terminated, truncated, info = env.step(action)
            over = terminated and (
                not isinstance(env.unwrapped, SpecEnv) or "text" in info
            )  # with episode="cycle" texts go on
            self.record(observation, action, float(reward), following, over)
            observation = env.reset()[0] if terminated or truncated else following
        return self

    def save(self, folder: Path) -> None:
        """Write checkpoint and replay buffer, ``rl_adapter.pth`` and ``rl_adapter.pth.buffer``."""
        self.adapter.save(folder / FILE)

    def load(self, folder: Path) -> None:
        """Read them.

        Raises:
            ValueError: none there, or others.
        """
        self.adapter.load(folder / FILE)
