"""A toy problem and a toy agent, added as the README describes with a file and a row each, work everywhere."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

import spec_envs
from spec_envs.agents import AGENTS, load
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.experiments.train import run

ID = "SpecToy-v0"
PROBLEM = '''
"""A toy problem: draft one token or several."""

from gymnasium import spaces

from spec_envs.controls.base import Control
from spec_envs.controls.observation.entries import text_entries


class ToyControl(Control):
    """## Description

    A chain of one token or of `long` tokens is drafted and verified.
    """

    name = "toy"
    observations = ("default",)
    width = 1
    prunable = False

    def __init__(self, long: int = 4, observation: str = "default", cost_features: bool = False):
        super().__init__(observation, cost_features)
        self.lengths, self.max_depth = (1, long), long - 1
        self.action_space = spaces.Discrete(2)
        self._declare(text_entries())

    def settings(self):
        return ("short", "long")

    def prepare(self, decoder):
        pass

    def act(self, decoder, action):
        return decoder.cycle(self.lengths[action])
'''
AGENT = '''
"""All actions in turn."""

from spec_envs.agents.rules.base import Rule


class TurnsAgent(Rule):
    """Takes every action in turn."""

    looks_at = ()
    remembers = ("turn",)

    def __init__(self, control, **hyperparameters):
        super().__init__(control, **hyperparameters)
        self.turn = self.settings.seed

    def decide(self, observation, state, start, deterministic):
        self.turn += 1
        return self.turn % self.control.action_space.n, state
'''
EXPERIMENT = """
env: {}
agents:
  random: {}
  fixed: {hyperparameters: {value: long}}
  turns: {}
  ppo: {total_timesteps: 64, hyperparameters: {n_steps: 32, batch_size: 32}}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the two files and their two rows, and yield the path of the YAML file."""
    for name, text in (("toy_problem.py", PROBLEM), ("toy_agent.py", AGENT), (f"{ID}.yml", EXPERIMENT)):
        (tmp_path / name).write_text(textwrap.dedent(text).lstrip())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(AGENTS, "turns", importlib.import_module("toy_agent").TurnsAgent)
    spec_envs.register(ID, "toy_problem:ToyControl")
    yield tmp_path / f"{ID}.yml"
    del spec_envs.ENVIRONMENTS[ID], gym.registry[ID], sys.modules["toy_agent"]
    sys.modules.pop("toy_problem", None)


@pytest.fixture
def keywords(tiny: dict[str, Any], tiny_draft: Path) -> dict[str, Any]:
    return tiny | {"drafter": str(tiny_draft)}


@pytest.mark.usefixtures("toy")
def test_toy_problem_passes_check_env(keywords: dict[str, Any]) -> None:
    env = gym.make(ID, **keywords)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("stanza", ["random", "fixed", "turns", "ppo"])
def test_toy_problem_is_trained_evaluated_and_generates(
    stanza: str, toy: Path, keywords: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"env.{key}={value}" for key, value in keywords.items()]
    experiment = load_experiment(ID, stanza, [*overrides, "test_prompts=2", "eval_prompts=2"], toy)
    run(experiment, ID, stanza, 0, folder := tmp_path / "run")
    table = capsys.readouterr().out
    assert all(f"| {arm} |" in table for arm in ("plain", "random", "static", stanza))
    assert "Best static setting on training prompts: " in table
    control, agent = load(folder)
    done = spec_envs.generate(decoder_for(keywords, control), control, agent, [3, 4, 5], 20).run()
    followed = control.followed(done.actions, [cycle.drafted for cycle in done.cycles])
    assert set(followed) <= set(control.settings()) and len(followed) == len(done.cycles) > 1
    assert stanza != "fixed" or set(followed) == {"long"}
