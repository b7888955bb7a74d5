"""The published selector of k with the ``predict`` of Stable-Baselines3."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field
from tqdm import tqdm

from spec_envs.agents.base import Agent
from spec_envs.agents.resuming import REMEDY, Progress
from spec_envs.agents.run import Run
from spec_envs.agents.selector.adapter import FILE, STATE, Replay, RLNetworkAdapter, SelectorSettings
from spec_envs.agents.timing import priced_network
from spec_envs.controls.base import Control
from spec_envs.controls.observation.rl_adapter_state import KS
from spec_envs.env import SpecEnv


class TextResults:
    """The results of a text's decisions."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.losses: list[float] = []

    def add(self, reward: float, loss: float | None) -> None:
        """Add the reward of a decision, and the loss of the update after it where there was one."""
        self.rewards.append(reward)
        if loss is not None:
            self.losses.append(loss)


class RLAdapterAgent(Agent):
    """Chooses how many entries of each draft distribution are sent over a link, by double Q-learning (van Hasselt et al.
    2016, arXiv 1509.06461, equation 4). It is the published selector, ``RLNetworkAdapter``, as an agent of
    ``SpecTopK-v0`` with ``observation="rl_adapter"``, 10 numbers. It continues to learn while it is deployed, with
    ``generate(…, learn=True)``, and reads and writes the published checkpoint.

    Args:
        control: SpecTopK-v0's with ``observation="rl_adapter"``.
        hyperparameters: fields of ``Settings``, by name; ``seed`` is also that of the training prompts.

    Attributes:
        adapter: the selector itself.
        decision_seconds: time of one decision, measured when the agent is made.

    Raises:
        ValueError: another control, an unknown hyper-parameter, or a checkpoint that cannot be read.
    """

    class Settings(SelectorSettings):
        path: str | None = Field(None, description="checkpoint to begin with; None begins with new networks")

    settings: Settings
    problems = ("topk",)
    learns_from = "rewards"

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        shape, actions = control.observation_space.shape, control.action_space
        if shape != (STATE,) or actions != spaces.Discrete(len(KS)):
            raise ValueError(
                f"the observation has the shape {shape} and the actions are {actions}, but rl-adapter needs ({STATE},) "
                "and "
                f'Discrete({len(KS)}), which are those of SpecTopK-v0 with observation="rl_adapter"'
            )
        self.adapter = RLNetworkAdapter({**self.settings.model_dump(), "path": None})
        if self.settings.path is not None:
            self.adapter.load(self.settings.path)
        self.decision_seconds = self.measure()

    @property
    def priced_seconds(self) -> float:
        """Seconds of a decision under a cost table."""
        return priced_network(self.adapter.policy_net)

    def measure(self) -> float:
        """Return the median seconds of a decision."""
        blank, timings = np.zeros(STATE, np.float32), []
        for _ in range(50):
            begin = time.perf_counter()
            self.predict(blank, deterministic=True)
            timings.append(time.perf_counter() - begin)
        return float(np.median(timings))

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """Return the action for one observation; unless ``deterministic``, a random one with probability ε."""
        return self.adapter.act(observation, training=not deterministic), state

    def record(
        self, observation: np.ndarray, action: int, reward: float, next_observation: np.ndarray, done: bool
    ) -> float | None:
        """Learn from an action's results, as ``RLNetworkAdapter.record`` does."""
        return self.adapter.record(observation, action, reward, next_observation, done)

    def learn(self, total_timesteps: int, env: gym.Env, run: Run | None = None) -> Self:
        """Act and learn for ``total_timesteps`` steps, continuing from the run's checkpoint.

        Raises:
            ValueError: a checkpoint that cannot be read.
        """
        progress = Progress(run or Run(), self.adapter.rng, env)
        begun = self._restore(progress.state) if progress.state else self.adapter.update_count
        progress.open_journal("rl_adapter", "reward", {"agent": "rl-adapter", "seed": self.settings.seed})
        results = TextResults()
        observation = progress.begin(self.settings.seed, begun)  # continued learning sees other prompts
        bar = tqdm(
            total=total_timesteps, initial=progress.steps, desc="learning k", unit="step", disable=progress.quiet
        )
        while progress.steps < total_timesteps:
            action = self.adapter.act(observation, training=True)
            following, reward, terminated, truncated, info = env.step(action)
            over = terminated and (
                not isinstance(env.unwrapped, SpecEnv) or "text" in info
            )  # with episode="cycle" texts continue
            loss = self.record(observation, action, float(reward), following, over)
            results.add(float(reward), loss)
            progress.steps += 1
            bar.update()
            observation = following
            if over:
                progress.texts += 1
                self._report(progress, results)
                if progress.due():
                    progress.save(self._state(begun))
                results, observation = TextResults(), progress.begin(self.settings.seed, begun)
            elif terminated or truncated:
                observation = env.reset()[0]
        bar.close()
        progress.journal.close()
        return self

    def _report(self, progress: Progress, results: TextResults) -> None:
        """Write a line of the log, at the end of a text."""
        adapter, mean = self.adapter, sum(results.rewards) / len(results.rewards)
        loss = sum(results.losses) / len(results.losses) if results.losses else None
        line = {"reward": mean, "loss": loss, "epsilon": adapter.epsilon, "updates": adapter.update_count}
        progress.journal.write("log", {"step": progress.steps, "texts": progress.texts, **line})

    def _state(self, begun: int) -> dict[str, Any]:
        """Return what learning needs to continue; the replay buffer keeps its order, which decides what is drawn."""
        replay = self.adapter.replay
        columns = {name: torch.from_numpy(column[: len(replay)]) for name, column in replay.columns.items()}
        return {"adapter": self.adapter.state(), "columns": columns, "added": replay.added, "begun": begun}

    def _restore(self, state: dict[str, Any]) -> int:
        """Continue from ``_state``, and return the updates with which the run had begun."""
        replay = Replay(self.adapter.settings.buffer_size)
        try:
            for name, column in replay.columns.items():
                rows = state["columns"][name].numpy()
                column[: len(rows)] = rows
            replay.added, begun = int(state["added"]), int(state["begun"])
            self.adapter.restore(state["adapter"], replay)
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"cannot continue from the checkpoint: {error}; {REMEDY}") from None
        return begun

    def save(self, folder: str | Path) -> None:
        """Write checkpoint and replay buffer, ``rl_adapter.pth`` and ``rl_adapter.pth.buffer``."""
        self.adapter.save(Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Read them.

        Raises:
            ValueError: none there, or others.
        """
        self.adapter.load(Path(folder) / FILE)
