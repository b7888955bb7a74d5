"""A toy problem and a toy agent, added as the documentation describes with a file and a row each, work everywhere."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

import spec_envs
from spec_envs.agents import AGENTS, SHIPPED, load
from spec_envs.controls import Control, make_control
from spec_envs.experiments.config import Experiment, load_experiment
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.experiments.runs import is_trained
from spec_envs.experiments.train import run
from tests.support import ROOT

ID, UNNAMED = "SpecToy-v0", "SpecUnnamedToy-v0"
PAGES = [ROOT / "docs" / "development" / name for name in ("add-an-environment.md", "add-an-agent.md")]
PROBLEM, AGENT = (re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[0] for page in PAGES)
UNNAMED_PROBLEM = """
from toy_problem import ToyControl


class UnnamedControl(ToyControl):
    name = "unnamed"

    def settings(self):
        return ()
"""
RULE = """
from spec_envs.agents.rules.base import Rule
from spec_envs.agents.settings import SeededSettings


class TurnsAgent(Rule):
    Settings = SeededSettings
    looks_at = ()
    remembers = ("turn",)

    def __init__(self, control, **hyperparameters):
        super().__init__(control, **hyperparameters)
        self.turn = self.settings.seed

    def decide(self, observation, state, start, deterministic):
        self.turn += 1
        return self.turn % self.control.action_space.n, state
"""
EXPERIMENT = """
env: {}
agents:
  random: {}
  fixed: {hyperparameters: {value: long}}
  turns: {}
  counting: {total_timesteps: 20}
  ppo: {total_timesteps: 64, hyperparameters: {n_steps: 32, batch_size: 32}}
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the files of toy problems and agents and their rows, and yield the path of the YAML file."""
    files = {"toy_problem": PROBLEM, "toy_unnamed": UNNAMED_PROBLEM, "toy_agent": AGENT, "toy_rule": RULE}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    (tmp_path / "toy.yml").write_text(EXPERIMENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(AGENTS, "turns", importlib.import_module("toy_rule").TurnsAgent)
    monkeypatch.setitem(AGENTS, "counting", importlib.import_module("toy_agent").CountingAgent)
    spec_envs.register(ID, "toy_problem:ToyControl")
    spec_envs.register(UNNAMED, "toy_unnamed:UnnamedControl")
    yield tmp_path / "toy.yml"
    for env_id in (ID, UNNAMED):
        del spec_envs.ENVIRONMENTS[env_id], gym.registry[env_id]
    for name in files:
        sys.modules.pop(name, None)


@pytest.fixture
def keywords(tiny: dict[str, Any], tiny_draft: Path) -> dict[str, Any]:
    return tiny | {"drafter": str(tiny_draft)}


@pytest.mark.usefixtures("toy")
def test_toy_problem_passes_check_env(keywords: dict[str, Any]) -> None:
    env = gym.make(ID, **keywords)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


def experiment_of(stanza: str, file: Path, keywords: dict[str, Any], *overrides: str, env_id: str = ID) -> Experiment:
    """Return a small experiment of the toy problem."""
    given = [f"env.{key}={value}" for key, value in keywords.items()]
    return load_experiment(env_id, stanza, [*given, "test_prompts=2", "eval_prompts=2", *overrides], file)


@pytest.mark.parametrize("stanza", ["random", "fixed", "turns", "counting", "ppo"])
def test_toy_problem_is_trained_evaluated_and_generates(
    stanza: str, toy: Path, keywords: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(experiment_of(stanza, toy, keywords), ID, stanza, 0, folder := tmp_path / "run")
    table = capsys.readouterr().out
    assert all(f"| {arm} " in table for arm in ("plain", "random", "static", stanza))
    assert re.search(r"static: .*, the best of \d+ fixed settings on training prompts", " ".join(table.split()))
    control, agent = load(folder)
    done = spec_envs.generate(decoder_for(keywords, control), control, agent, [3, 4, 5], 20).run()
    followed = control.followed(done.actions, [cycle.drafted for cycle in done.cycles])
    assert set(followed) <= set(control.settings()) and len(followed) == len(done.cycles) > 1
    assert stanza != "fixed" or set(followed) == {"long"}


@pytest.mark.parametrize("stanza", ["counting", "ppo"])
def test_problem_without_static_settings_has_a_table(
    stanza: str, toy: Path, keywords: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(experiment_of(stanza, toy, keywords, env_id=UNNAMED), UNNAMED, stanza, 0, tmp_path / "run")
    table = capsys.readouterr().out
    assert all(f"| {arm} " in table for arm in ("plain", "plain again", "random", stanza))
    assert "| static " not in table and "fixed settings" not in table


def test_trained_agent_is_never_trained_again_or_lost(
    toy: Path, keywords: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the files of an agent are called, a run knows that it is trained."""
    experiment = experiment_of("counting", toy, keywords)
    run(experiment, ID, "counting", 0, folder := tmp_path / "run")
    (folder / "results.json").unlink()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def learn(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(AGENTS["counting"], "learn", learn)
    more = experiment_of("counting", toy, keywords, "total_timesteps=30")
    with pytest.raises(ValueError, match="holds a run with other settings: total_timesteps 20 instead of 30; choose"):
        run(more, ID, "counting", 0, folder)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    run(experiment, ID, "counting", 0, folder)
    assert (folder / "results.json").exists() and (folder / "counting.json").exists()
    (folder / "counting.json").unlink()  # the remedy for a damaged one
    with pytest.raises(AssertionError, match="trained again"):
        run(experiment, ID, "counting", 0, folder)


def test_runs_of_earlier_versions_are_recognised(tmp_path: Path) -> None:
    for name in ("policy.safetensors", "rl_adapter.pth", "exit.json"):
        folder = tmp_path / name
        folder.mkdir()
        assert not is_trained(folder)
        (folder / name).touch()
        assert is_trained(folder)
    assert all(is_trained(folder) for folder in SHIPPED.iterdir())


def test_folder_of_something_else_is_refused(toy: Path, keywords: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("the only copy")
    with pytest.raises(ValueError, match=r"run holds files, but no config.yml of a run"):
        run(experiment_of("counting", toy, keywords), ID, "counting", 0, tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").exists()


@pytest.mark.usefixtures("toy")
def test_unfinished_classes_are_refused_in_one_sentence() -> None:
    import toy_problem  # type: ignore[import-not-found]

    class Empty(toy_problem.ToyControl):  # type: ignore[misc]
        def __init__(self) -> None:
            Control.__init__(self, "default", False)

    class Nameless(toy_problem.ToyControl):  # type: ignore[misc]
        name = ""

    vars(toy_problem).update(Empty=Empty, Nameless=Nameless)
    with pytest.raises(ValueError, match="Empty has no action_space, max_depth, observation_space; its __init__ sets"):
        make_control("toy_problem:Empty", {})
    with pytest.raises(ValueError, match="toy_problem:Nameless has no name; write name = "):
        make_control("toy_problem:Nameless", {})
    with pytest.raises(ValueError, match=r"toy_problem:spaces is .*; expected a class derived from"):
        make_control("toy_problem:spaces", {})
    with pytest.raises(ValueError, match="no control is found at 'toy_problem:Missing', expected \"module:Class\""):
        make_control("toy_problem:Missing", {})
    with pytest.raises(ValueError, match="control is 'nope'; expected \"module:Class\""):
        spec_envs.register("Bad", "nope")
    assert "Bad" not in spec_envs.ENVIRONMENTS
    with pytest.raises(TypeError, match=r"Odd.Settings is not derived from AgentSettings; write class Settings\("):

        class Odd(AGENTS["counting"]):  # type: ignore[misc]
            class Settings:
                value: int = 3


@pytest.mark.parametrize("name", AGENTS)
def test_environment_in_place_of_a_control_is_refused(name: str) -> None:
    env = gym.make("SpecK-v0", trace="qwen2.5-coder-32b-cpu")
    with pytest.raises(TypeError, match=r"was given the environment .*; expected its control, .unwrapped.control"):
        AGENTS[name](env)  # type: ignore[arg-type]
