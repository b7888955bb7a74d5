"""Small training runs, and interrupted ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spec_envs.agents import resuming
from spec_envs.agents.exits.online import OnlineAgent
from spec_envs.agents.sb3.agent import SB3Agent
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments import train
from spec_envs.experiments.config import Experiment, load_experiment
from spec_envs.files import LOCK
from tests.support.traced import CASES

PROFILE = "qwen2.5-coder-32b-cpu"
SMALL = {"cycles": 256, "rounds": 2, "steps": 20, "hidden": 8}


class Run(NamedTuple):
    """An environment id and a small experiment for it."""

    env_id: str
    experiment: Experiment

    def train(self, folder: Path) -> None:
        train.trained(self.experiment, self.env_id, "stanza", 0, folder)


def run_of(env_id: str, stanza: str, *overrides: str) -> Run:
    """Return a run of a stanza with overrides."""
    return Run(env_id, load_experiment(env_id, stanza, overrides))


def on_profile(agent: str, *overrides: str) -> Run:
    """Return a small run of an agent on the synthetic profile."""
    own = [
        f"env.trace={PROFILE}",
        "env.max_new_tokens=32",
        "total_timesteps=192",
        "checkpoint_freq=64",
        "eval_prompts=2",
    ]
    return run_of("SpecK-v0", agent, *own, "eval_freq=96", "test_prompts=3", *overrides)


def runs(tiny: dict[str, Any], traces: dict[str, Trace]) -> dict[str, Run]:
    """Return one run of each kind of agent, all with priced clocks."""
    trace = {"trace": str(traces["tree"].folder), "max_new_tokens": 20, **CASES["tree"][2], "budgets": [0, 2, 30]}
    dvi = [f"env.{key}={value}" for key, value in tiny.items() if key != "drafter"]
    dvi += ["own_text=0", "env.exit_layer=3", "env.adapter=head", "eval_freq=0", "checkpoint_freq=20"]
    link = ["env.max_new_tokens=24", "total_timesteps=128", "checkpoint_freq=32", "env.trace=smollm2-135m-topk"]
    token = ["env.decision=token", "total_timesteps=600", "checkpoint_freq=100"]
    return {
        "ppo": on_profile("ppo-live", "hyperparameters.n_steps=64", "hyperparameters.batch_size=32"),
        "dqn": on_profile("dqn", "hyperparameters.learning_starts=32", "hyperparameters.buffer_size=100"),
        "hindsight": Run("SpecTree-v0", Experiment(agent="hindsight", env=trace, hyperparameters=SMALL)),
        "dvi": run_of("SpecDVI-v0", "dvi", *dvi, "hyperparameters.texts=6", "hyperparameters.fast_batch=8"),
        "rl-adapter": run_of("SpecTopK-v0", "rl-adapter", *link, "hyperparameters.batch_size=16"),
        "specdec++": on_profile("specdec++", *token, "hyperparameters.epochs=5"),
    }


class Killed(BaseException):
    """Stand for SIGKILL: no code catches it."""


def train_until_killed(run: Run, folder: Path, after: int = 2) -> None:
    """Train until ``after`` checkpoints are written, then raise ``Killed``, which is caught here."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in (
            (SB3Agent, "save_checkpoint"),
            (OnlineAgent, "save_checkpoint"),
            (resuming.Progress, "save"),
        ):
            patch.setattr(kind, name, raise_after(getattr(kind, name), after))
        with pytest.raises(Killed):
            run.train(folder)


def raise_after(save: Callable[..., Any], after: int) -> Callable[..., Any]:
    """Return a function that saves, and raises ``Killed`` after the given number of calls."""
    remaining = iter(range(after - 1))

    @functools.wraps(save)
    def saved(*args: Any, **keywords: Any) -> None:
        save(*args, **keywords)
        if next(remaining, None) is None:
            raise Killed

    return saved


def weights(folder: Path) -> dict[str, bytes]:
    """Return the learned weights of a run: file contents by relative path."""
    kinds = ("*.safetensors", "*.pth", "exit.json")
    files = [path for kind in kinds for path in sorted(folder.glob(kind)) + sorted(folder.glob(f"*_*/{kind}"))]
    assert files
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def files_of(folder: Path) -> list[Path]:
    """Return the files of a run that are read again, sorted, without the lock and TensorBoard events."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != LOCK and "events" not in str(p))
