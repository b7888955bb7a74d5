"""Callbacks that keep an agent while Stable-Baselines3 trains it: figures, validations, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, TensorBoardOutputFormat

from spec_envs.agents.journal import append_line, keep_lines
from spec_envs.agents.run import CHECKPOINT, Run

BEST = "best"  # folder of the best agent, below the run's
TEXT_ONLY = ("stdout", "log", "json", "csv")  # formats that cannot show a histogram


class Monitor(BaseCallback):
    """Log throughput, speedup, emitted per cycle, acceptance, seconds by part and actions by task, per rollout.

    Args:
        path: JSONL file that gets a line per rollout.
        hyperparameters: shown in TensorBoard's HPARAMS tab.
    """

    def __init__(self, path: Path, hyperparameters: dict[str, Any]):
        super().__init__()
        self.path, self.hyperparameters = path, hyperparameters
        self._clear()

    def _clear(self) -> None:
        self.emitted = self.accepted = self.verified = self.cycles = 0
        self.seconds: dict[str, float] = {}
        self.actions: dict[str, list[int]] = {}

    def _on_training_start(self) -> None:
        keep_lines(self.path, lambda line: line["timesteps"] <= self.num_timesteps)  # what came later is done again
        shown = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in self.hyperparameters.items()}
        metrics = {"spec/tokens_per_second": 0.0, "spec/speedup": 0.0, "rollout/ep_rew_mean": 0.0}
        self.logger.record("hparams", HParam(shown, metrics), exclude=TEXT_ONLY)

    def _on_step(self) -> bool:
        tasks = self.training_env.get_attr("prompt")
        for info, action, prompt in zip(self.locals["infos"], self.locals["actions"], tasks, strict=True):
            self.actions.setdefault(info.get("task") or prompt.task, []).append(int(action))
            for part, s in info["seconds"].items():
                self.seconds[part] = self.seconds.get(part, 0.0) + s
            self.emitted += info["emitted"]
            self.accepted += info["accepted"]
            self.verified += info["verified"]
            self.cycles += info["emitted"] > 0
        if sum(map(len, self.actions.values())) >= 512:  # off-policy rollouts are a few steps long
            self._report()
        return True

    def _on_rollout_end(self) -> None:
        if sum(map(len, self.actions.values())) >= 128:
            self._report()

    def _on_training_end(self) -> None:
        self._report()

    def _report(self) -> None:
        """Log the figures since the last report."""
        total = sum(self.seconds.values())
        if not self.cycles or not total:
            return
        line = {
            "tokens_per_second": self.emitted / total,
            "speedup": self.emitted / total / self.training_env.get_attr("plain_rate")[0],
            "emitted_per_cycle": self.emitted / self.cycles,
            "accepted_per_cycle": self.accepted / self.cycles,
            "acceptance": self.accepted / max(1, self.verified),
            **{f"seconds_{part}": s for part, s in self.seconds.items()},
        }
        for name, value in line.items():
            self.logger.record(f"spec/{name}", value)
        for task, actions in self.actions.items():
            self.logger.record(f"actions/{task}", torch.tensor(actions, dtype=torch.float32), exclude=TEXT_ONLY)
        append_line(self.path, {"timesteps": self.num_timesteps, "cycles": self.cycles, **line})
        self._clear()


class Kept(Protocol):
    """The methods of the trained agent that ``Keeper`` calls."""

    def redeploy(self) -> None:
        """Decide by the policy's present weights."""

    def save(self, folder: str | Path) -> None:
        """Write the policy's weights."""

    def save_checkpoint(self, folder: Path, **beside: Any) -> None:
        """Write everything that training needs to continue, with the given state beside it."""


class Keeper(BaseCallback):
    """Validate and write checkpoints between rollouts, when no update is half done.

    Args:
        agent: the agent that is trained.
        folder: the run's; ``best/`` below it keeps the best agent, ``last/`` the checkpoint.
        run: how often; without validations the last agent is the best.
        history: steps and speedup of the validations so far; they are kept in the checkpoint.
    """

    def __init__(self, agent: Kept, folder: Path, run: Run, history: Sequence[tuple[int, float]] = ()):
        super().__init__()
        self.agent, self.folder, self.run = agent, folder, run
        self.history = [(int(step), float(value)) for step, value in history]

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        self.saved = self.num_timesteps

    def _on_rollout_start(self) -> None:
        if self.run.eval_freq and self.num_timesteps - self._validated() >= self.run.eval_freq:
            self._validate()
            self._save()
        elif self.num_timesteps - self.saved >= self.run.checkpoint_freq:
            self._save()

    def _on_training_end(self) -> None:
        if self.run.eval_freq and self.num_timesteps > self._validated():
            self._validate()
        self._save()

    def _validated(self) -> int:
        """Return the steps at the last validation."""
        return self.history[-1][0] if self.history else 0

    def _validate(self) -> None:
        """Validate the current agent, and keep it if it is the best so far."""
        if self.run.validate is None:
            return
        self.agent.redeploy()
        value = self.run.validate(self.agent)["speedup"]
        if not self.history or value > max(v for _, v in self.history):
            self.agent.save(self.folder / BEST)
        self.history.append((self.num_timesteps, value))
        for writer in (f.writer for f in self.logger.output_formats if isinstance(f, TensorBoardOutputFormat)):
            writer.add_scalar("validation/speedup", value, self.num_timesteps)

    def _save(self) -> None:
        self.agent.save_checkpoint((self.folder / CHECKPOINT).parent, history=self.history)
        self.saved = self.num_timesteps
