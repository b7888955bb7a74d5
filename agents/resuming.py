"""Learning that resumes after it was killed, text by text: the draws for a text depend on its number alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from spec_envs.agents.journal import Journal
from spec_envs.agents.run import CHECKPOINT, Run
from spec_envs.decoding.clock import PARTS
from spec_envs.env import SpecEnv
from spec_envs.sealed import first_line, read_torch, write_torch

REMEDY = "delete it to start over"


class Progress:
    """The progress of learning in a run.

    Args:
        run: where it is kept; checkpoints are written at the end of a text.
        rng: the learner's generator; it continues where it was.

    Attributes:
        steps, texts: decisions made and texts ended so far.
        state: the learner's saved state; None where there is no checkpoint to continue from.
        journal: ``log.jsonl`` and TensorBoard.

    Raises:
        ValueError: the run's checkpoint cannot be read.
    """

    def __init__(self, run: Run, rng: np.random.Generator, env: gym.Env):
        self.folder, self.checkpoint_freq, self.quiet = run.folder, run.checkpoint_freq, not run.progress_bar
        self.rng, self.env = rng, env
        self.steps = self.texts = self.saved = 0
        self.state: dict[str, Any] | None = None
        if run.folder is not None and run.begun:
            self._read(run.folder / CHECKPOINT)
        self.journal = Journal(None, 0, 0, {}, prefix="", figure="")

    def _read(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = read_torch(path, "the checkpoint", REMEDY)
        try:
            self.steps = self.saved = int(state["steps"])
            self.texts, self.state = int(state["texts"]), dict(state["learner"])
            self.rng.bit_generator.state = json.loads(state["rng"])
            if isinstance(self.env.unwrapped, SpecEnv):
                prompts = self.env.unwrapped.prompts
                prompts.texts, prompts.turn = int(state["env_texts"]), str(state["env_turn"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read the checkpoint {path}: {first_line(error)}; {REMEDY}") from None

    def open_journal(self, prefix: str, figure: str, hyperparameters: dict[str, Any]) -> None:
        """Open the log; lines written after the checkpoint are dropped, because their steps are taken again."""
        self.journal = Journal(self.folder, self.steps, self.texts, hyperparameters, prefix, figure)

    def begin(self, *seeds: int) -> np.ndarray:
        """Begin the next text and return its first observation."""
        env = self.env.unwrapped
        env.np_random = np.random.default_rng([*seeds, self.texts])
        if isinstance(env, SpecEnv):  # so that seconds are the same to the last bit, whatever came before
            env.decoder.clock.totals = dict.fromkeys(PARTS, 0.0)
        observation: np.ndarray = self.env.reset()[0]
        return observation

    def due(self) -> bool:
        """Return whether a checkpoint is due at the end of a text."""
        return self.folder is not None and self.steps - self.saved >= self.checkpoint_freq

    def save(self, learner: dict[str, Any]) -> None:
        """Write a checkpoint with what the learner needs to continue."""
        if self.folder is None:
            return
        (self.folder / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
        env = self.env.unwrapped
        turn = {"env_texts": env.prompts.texts, "env_turn": env.prompts.turn} if isinstance(env, SpecEnv) else {}
        state = {"steps": self.steps, "texts": self.texts, "learner": learner, **turn}
        write_torch(self.folder / CHECKPOINT, state | {"rng": json.dumps(self.rng.bit_generator.state)})
        self.saved = self.steps
