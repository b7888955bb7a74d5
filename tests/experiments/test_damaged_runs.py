"""Run folders with a damaged file continue and load as before, or are refused with an error that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spec_envs import agents
from spec_envs.agents.exits.online import OnlineAgent
from spec_envs.agents.sb3.agent import SB3Agent
from spec_envs.experiments import train
from spec_envs.sealed import digest, read_torch
from tests.support.runs import Run, files_of, train_until_killed, weights


@pytest.fixture(scope="module")
def killed_runs(
    small_runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, bytes]]]:
    """Return, by agent, the folder of a killed run and the weights that it ends with."""
    found = {}
    for name in ("ppo", "dqn", "dvi", "rl-adapter"):
        folder = tmp_path_factory.mktemp(name)
        train_until_killed(small_runs[name], folder / "killed", 1)
        shutil.copytree(folder / "killed", folder / "done")
        small_runs[name].train(folder / "done")
        found[name] = folder / "killed", weights(folder / "done")
    return found


@pytest.fixture(scope="module")
def finished_runs(small_runs: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Return, by agent, the folder of a finished_runs run and a hash of what is loaded from it."""
    found = {}
    for name in small_runs:
        folder = tmp_path_factory.mktemp(name) / "run"
        small_runs[name].train(folder)
        found[name] = folder, loaded(folder)
    return found


def loaded(folder: Path) -> str:
    """Return a hash of all numbers of the agent that ``agents.load`` loads from a run."""
    control, agent = agents.load(folder)
    state: dict[str, Any] = {"seconds": 0.0 if isinstance(agent, OnlineAgent) else agent.decision_seconds}
    if isinstance(agent, SB3Agent):
        state |= agent.model.policy.state_dict()
    elif isinstance(agent, OnlineAgent):
        state |= agent.adapter.state_dict() | {"shortlist": agent.adapter.shortlist.tolist()}
    elif hasattr(agent, "network"):
        state |= agent.network.state_dict()
    elif hasattr(agent, "head"):
        state |= agent.head.state_dict()
    else:
        state |= agent.adapter.policy_net.state_dict()
    prices = control.costs and (control.costs.verify, control.costs.draft)
    return digest([dict(state), prices])


class Damage(NamedTuple):
    """Damage to one file."""

    kind: str
    place: float
    bit: int

    def to(self, path: Path) -> None:
        data = path.read_bytes()
        at = min(int(self.place * len(data)), max(0, len(data) - 1))
        if self.kind == "empty":
            data = b""
        elif self.kind == "cut":
            data = data[:at]
        elif self.kind == "nested":
            data = b"[" * 100_000
        elif self.kind == "other":
            data = b'{"a": NaN}'
        elif data:
            data = data[:at] + bytes([data[at] ^ 1 << self.bit]) + data[at + 1 :]
        path.write_bytes(data)


DAMAGES = st.builds(
    Damage,
    st.sampled_from(["empty", "cut", "cut", "nested", "other", "flipped", "flipped", "flipped"]),
    st.floats(0, 1),
    st.integers(0, 7),
)


def names_damaged_file(error: ValueError, path: Path, folder: Path) -> bool:
    """Return True if the error is one sentence that names the damaged file."""
    sentence = str(error)
    return "\n" not in sentence and (path.name in sentence or (path.name == "config.yml" and str(folder) in sentence))


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["ppo", "dqn", "dvi", "rl-adapter"])
@settings(
    max_examples=max(4, settings.default.max_examples // 3),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_damaged_folder_resumes_exactly_or_is_refused(
    name: str,
    small_runs: dict[str, Run],
    killed_runs: dict[str, tuple[Path, dict[str, bytes]]],
    tmp_path: Path,
    data: st.DataObject,
) -> None:
    folder, expected = killed_runs[name]
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    path = data.draw(st.sampled_from(files_of(copy)))
    data.draw(DAMAGES).to(path)
    try:
        small_runs[name].train(copy)
    except ValueError as error:
        assert names_damaged_file(error, path, copy), (path, error)
    else:
        assert weights(copy) == expected


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["ppo", "dqn", "hindsight", "dvi", "rl-adapter", "specdec++"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_run_loads_exactly_or_is_refused(
    name: str, finished_runs: dict[str, tuple[Path, str]], tmp_path: Path, data: st.DataObject
) -> None:
    folder, expected = finished_runs[name]
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    readable = [path for path in files_of(copy) if path.name != "config.yml"]
    path = data.draw(st.sampled_from(readable))
    data.draw(DAMAGES).to(path)
    try:
        found = loaded(copy)
    except ValueError as error:
        assert names_damaged_file(error, path, copy) or path.parent.name in str(error), (path, error)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 50_000, "a: b", "- 1", "id: [1]\nenv: {}\nagent: {}\nhyperparameters: {}"]
)
def test_invalid_config_is_refused_in_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(content)
    with pytest.raises(
        ValueError, match=r"^\S+ is not a readable run folder \([^\n]*\); expected one written by `spec-envs train`$"
    ):
        agents.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agent": "pppo"}, "names the unknown agent 'pppo'"),
        ({"hyperparameters": [1]}, "hyperparameters holds no keys"),
        ({"hyperparameters": {"n_steps": 0}}, "config.yml has settings that cannot be built"),
        ({"hyperparameters": {"learning_rate": "much"}}, "config.yml has settings that cannot be built"),
        ({"hyperparameters": {"pi_arch": [10**12]}}, "config.yml has settings that cannot be built"),
        ({"env": {"k_maxx": 2}}, "config.yml has settings that cannot be built"),
    ],
)
def test_config_that_cannot_be_built_is_refused_in_one_sentence(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"id": "SpecK-v0", "env": {}, "agent": "ppo", "hyperparameters": {}} | change
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=message) as error:
        agents.load(tmp_path)
    assert "\n" not in str(error.value)


def test_run_as_its_own_partner_is_refused(tmp_path: Path) -> None:
    config = {"id": "SpecDepth-v0", "env": {}, "agent": "random", "hyperparameters": {}, "partner": str(tmp_path)}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="is its own partner"):
        agents.load(tmp_path)


def test_tensors_larger_than_file_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(10**9)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt: it is damaged \(its tensors are larger than the file\)"):
        read_torch(tmp_path / "checkpoint.pt", "the checkpoint", "delete it")


def test_weights_without_hash_are_read(small_runs: dict[str, Run], tmp_path: Path) -> None:
    small_runs["ppo"].train(tmp_path)
    path = tmp_path / "policy.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {"decision_seconds": file.metadata()["decision_seconds"]}
    save_file(load_file(path), path, metadata)
    agents.load(tmp_path)


def test_damaged_results_of_finished_run_are_refused(
    small_runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_runs["ppo"]
    train.run(run.experiment, run.env_id, "stanza", 0, tmp_path / "run")
    results = tmp_path / "run" / "results.json"
    capsys.readouterr()
    train.run(run.experiment, run.env_id, "stanza", 0, tmp_path / "run")
    table = capsys.readouterr().out
    assert "is finished" in table and "| ppo " in table and "On 3 held-out prompts" in table
    whole = results.read_text()
    digit = next(i for i in range(whole.index("tokens_per_second"), len(whole)) if whole[i] in "12345678")
    for damaged in ("", whole[:-9], whole[:digit] + "9" + whole[digit + 1 :], "{}", "[" * 100_000):
        results.write_text(damaged)
        with pytest.raises(ValueError, match=r"results.json .*; delete it to make the table again"):
            train.run(run.experiment, run.env_id, "stanza", 0, tmp_path / "run")
