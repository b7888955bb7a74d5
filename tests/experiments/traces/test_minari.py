"""Exported Minari data sets hold the recorded episodes, which their seeds and actions reproduce."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs.agents import AGENTS
from spec_envs.decoding.traces.trace import Trace
from spec_envs.env import SpecEnv
from spec_envs.experiments.config import Experiment
from spec_envs.experiments.runs import open_run, resolved
from spec_envs.experiments.traces import minari as minari_export
from spec_envs.experiments.traces.minari import exported

minari = pytest.importorskip("minari", reason="the extra `minari` is not installed")


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of the data sets, which Minari is set to use."""
    folder = tmp_path / "datasets"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    return folder


def replays(dataset: Any) -> int:
    """Replay every episode and compare it with the recording; return the number of steps."""
    env, steps = dataset.recover_environment(), 0
    metadata = list(dataset.storage.get_episode_metadata(range(dataset.total_episodes)))
    for episode, stored in zip(dataset.iterate_episodes(), metadata, strict=True):
        observation, info = env.reset(seed=stored.get("seed"))
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(observation, episode.observations[t])
            observation, reward, terminated, truncated, info = env.step(action)
            assert reward == episode.rewards[t]
            assert terminated == episode.terminations[t] and truncated == episode.truncations[t]
            assert info["emitted"] == episode.infos["emitted"][t + 1]
            assert info["seconds"]["draft"] == episode.infos["seconds"]["draft"][t + 1]
            steps += 1
        assert terminated and not episode.truncations.any() and episode.terminations.sum() == 1
        np.testing.assert_array_equal(observation, episode.observations[-1])
        for name in ("task", "tokens", "speedup"):
            assert stored.get(name) == info.get(name)
    return steps


@pytest.mark.parametrize(
    ("env_id", "kind", "policy", "overrides"),
    [
        ("SpecDepth-v0", "tree", "random", []),
        ("SpecDepth-v0", "tree", "static:2", ["episode=cycle", "reward=ltd"]),
        ("SpecBudget-v0", "tree", "random", ["depth=random", "budgets=[0,1,3,9]"]),
        ("SpecTree-v0", "tree", "static:1x7", ["split=test"]),
        ("SpecK-v0", "chain", "static:3", []),
    ],
)
def test_episodes_replay_exactly(
    env_id: str,
    kind: str,
    policy: str,
    overrides: list[str],
    traces: dict[str, Trace],
) -> None:
    exported("spec-envs/tiny-v0", traces[kind].folder, env_id, policy, 6, 11, overrides)
    dataset = minari.load_dataset("spec-envs/tiny-v0")
    assert dataset.total_episodes == 6 and dataset.env_spec.id == env_id
    env = gym.make(dataset.env_spec)
    assert dataset.observation_space == env.observation_space and dataset.action_space == env.action_space
    assert replays(dataset) == dataset.total_steps > 6


def test_run_acts_in_data_set_as_trained(traces: dict[str, Trace], tmp_path: Path) -> None:
    folder = tmp_path / "a2c-0"
    keywords = {"max_new_tokens": 20, "width": 4, "max_depth": 3, "budget": 5}
    experiment = Experiment(agent="a2c", env=keywords, hyperparameters={"n_steps": 8})
    open_run(folder, resolved(experiment, "SpecDepth-v0", "a2c", 0))
    keywords["trace"] = str(traces["tree"].folder)
    env: Any = gym.make("SpecDepth-v0", **keywords).unwrapped
    agent = AGENTS["a2c"](control=env.control, n_steps=8).learn(32, env)
    agent.save(folder)
    dataset = exported("run-v3", traces["tree"].folder, "SpecDepth-v0", str(folder), 3)
    assert replays(dataset) == dataset.total_steps
    recovered = dataset.recover_environment().unwrapped
    assert isinstance(recovered, SpecEnv) and recovered.policy_seconds == agent.decision_seconds
    for episode in dataset.iterate_episodes():
        chosen = [agent.predict(seen, deterministic=True)[0] for seen in episode.observations[:-1]]
        assert chosen == episode.actions.tolist()
    with pytest.raises(ValueError, match="give --env SpecDepth-v0"):
        exported("run-v4", traces["tree"].folder, "SpecTree-v0", str(folder), 3)
    with pytest.raises(ValueError, match="was made for"):
        exported("run-v4", traces["tree"].folder, "SpecDepth-v0", str(folder), 3, overrides=["max_depth=4"])


def test_command_reports_data_set_and_errors(
    traces: dict[str, Trace],
    datasets: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(traces["tree"].folder), "--episodes", "2", "--name"]
    minari_export.main([*given, "spec-envs/depth-random-v0"])
    assert 'minari.load_dataset("spec-envs/depth-random-v0")' in capsys.readouterr().out
    assert list(minari.list_local_datasets()) == ["spec-envs/depth-random-v0"]
    for rest, sentence in (
        (["spec-envs/depth-random-v0"], "there is a data set spec-envs/depth-random-v0 in"),
        (["depth-random"], "expected one such as spec-envs/depth-random-v0"),
        (["a-v0", "--policy", "static:99"], "value is 99"),
        (["a-v0", "--policy", "nowhere"], "nowhere is not a readable run folder"),
        (["a-v0", "--set", "bugdet=3"], "did you mean 'budget'"),
        (["a-v0", "--env", "SpecK-v0"], "has trees, which do not replay SpecK-v0"),
        (["a-v0", "--episodes", "0"], "expected 1 or more"),
    ):
        with pytest.raises(SystemExit) as ended:
            minari_export.main([*given, *rest])
        assert str(ended.value).startswith("error: ") and sentence in str(ended.value)
    assert [path.name for path in datasets.iterdir()] == ["spec-envs"]
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SystemExit, match=r"install the extra `minari`, as in pip install 'spec-envs\[minari\]'"):
        minari_export.main([*given, "a-v0"])


def test_killed_export_leaves_no_data_set(
    traces: dict[str, Trace], datasets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An incomplete data set is hidden, and the next export of the same name removes it."""

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit

    arguments = ("spec-envs/tiny-v0", traces["tree"].folder, "SpecDepth-v0", "random", 2)
    with monkeypatch.context() as patch:
        patch.setattr(minari_export, "moved", killed)
        patch.setattr(minari_export.shutil, "rmtree", lambda *_, **__: None)  # SIGKILL leaves no time to clean up
        with pytest.raises(SystemExit):
            exported(*arguments)
    assert not minari.list_local_datasets() and list((datasets / ".spec-envs").rglob("*.hdf5"))
    dataset = exported(*arguments)
    assert list(minari.list_local_datasets()) == ["spec-envs/tiny-v0"] and dataset.total_episodes == 2
    assert not list((datasets / ".spec-envs").rglob("*.hdf5"))
    assert Path(dataset.storage.data_path).is_relative_to(datasets / "spec-envs")
    exported("tiny-v0", *arguments[1:])
    assert sorted(minari.list_local_datasets()) == ["spec-envs/tiny-v0", "tiny-v0"]
