"""Run folders: training that is killed, doubled, damaged, resumed."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spec_envs import agents
from spec_envs.agents import resuming
from spec_envs.agents.exits.online import OnlineAgent
from spec_envs.agents.sb3.agent import SB3Agent
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments import train
from spec_envs.experiments.config import Experiment, load_experiment
from spec_envs.files import LOCK, held
from spec_envs.sealed import digest, read_sealed, read_torch
from tests.support import ROOT
from tests.support.traced import CASES

PROFILE = "qwen2.5-coder-32b-cpu"
SMALL = {"cycles": 256, "rounds": 2, "steps": 20, "hidden": 8}


class Run(NamedTuple):
    """A small run."""

    env_id: str
    experiment: Experiment

    def train(self, folder: Path) -> None:
        train.trained(self.experiment, self.env_id, "stanza", 0, folder)


def run_of(env_id: str, stanza: str, *overrides: str) -> Run:
    return Run(env_id, load_experiment(env_id, stanza, overrides))


def on_profile(agent: str, *overrides: str) -> Run:
    own = [
        f"env.trace={PROFILE}",
        "env.max_new_tokens=32",
        "total_timesteps=192",
        "checkpoint_freq=64",
        "eval_prompts=2",
    ]
    return run_of("SpecK-v0", agent, *own, "eval_freq=96", "test_prompts=3", *overrides)


def runs(tiny: dict[str, Any], traces: dict[str, Trace]) -> dict[str, Run]:
    """A run of each kind of agent, whose clock is priced."""
    trace = {"trace": str(traces["tree"].folder), "max_new_tokens": 20, **CASES["tree"][2], "budgets": [0, 2, 30]}
    dvi = [f"env.{key}={value}" for key, value in tiny.items() if key != "drafter"]
    dvi += ["own_text=0", "env.exit_layer=3", "env.adapter=head", "eval_freq=0", "checkpoint_freq=20"]
    link = ["env.max_new_tokens=24", "total_timesteps=128", "checkpoint_freq=32", "env.trace=smollm2-135m-topk"]
    token = ["env.decision=token", "total_timesteps=600", "checkpoint_freq=100"]
    return {
        "ppo": on_profile("ppo", "hyperparameters.n_steps=64", "hyperparameters.batch_size=32"),
        "dqn": on_profile("dqn", "hyperparameters.learning_starts=32", "hyperparameters.buffer_size=100"),
        "hindsight": Run("SpecTree-v0", Experiment(agent="hindsight", env=trace, hyperparameters=SMALL)),
        "dvi": run_of("SpecDVI-v0", "dvi", *dvi, "hyperparameters.texts=6", "hyperparameters.fast_batch=8"),
        "rl-adapter": run_of("SpecTopK-v0", "rl-adapter", *link, "hyperparameters.batch_size=16"),
        "specdec++": on_profile("specdec++", *token, "hyperparameters.epochs=5"),
    }


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def killed(run: Run, folder: Path, after: int = 2) -> None:
    """Train until so many checkpoints are written."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in (
            (SB3Agent, "save_checkpoint"),
            (OnlineAgent, "save_checkpoint"),
            (resuming.Progress, "save"),
        ):
            patch.setattr(kind, name, dying(getattr(kind, name), after))
        with pytest.raises(Killed):
            run.train(folder)


def dying(save: Callable[..., Any], after: int) -> Callable[..., Any]:
    left = iter(range(after - 1))

    @functools.wraps(save)
    def saved(*args: Any, **keywords: Any) -> None:
        save(*args, **keywords)
        if next(left, None) is None:
            raise Killed

    return saved


def weights(folder: Path) -> dict[str, bytes]:
    """What a run has learned."""
    kinds = ("*.safetensors", "*.pth", "exit.json")
    files = [path for kind in kinds for path in sorted(folder.glob(kind)) + sorted(folder.glob(f"*_*/{kind}"))]
    assert files
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def every(tiny: dict[str, Any], traces: dict[str, Trace]) -> dict[str, Run]:
    return runs(tiny, traces)


@pytest.mark.parametrize("name", ["ppo", "dqn", "hindsight", "rl-adapter", "specdec++", "dvi"])
def test_two_runs_of_a_seed_have_the_same_bits(name: str, every: dict[str, Run], tmp_path: Path) -> None:
    """Also where a busy machine measured other times for a decision."""
    for folder in ("a", "b"):
        every[name].train(tmp_path / folder)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    if name != "dvi":
        logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("a", "b")]
        assert logs[0] == logs[1]
        _, agent = agents.load(tmp_path / "a")
        assert agent.decision_seconds == agents.load(tmp_path / "b")[1].decision_seconds > 0


@pytest.mark.parametrize("name", ["rl-adapter", "specdec++", "dvi"])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_left_alone(
    name: str, every: dict[str, Run], tmp_path: Path
) -> None:
    every[name].train(tmp_path / "whole")
    killed(every[name], tmp_path / "killed", 1)
    assert not [path for path in train.TRAINED if (tmp_path / "killed" / path).exists()]
    every[name].train(tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("whole", "killed")]
    assert logs[0] == logs[1]
    for line in logs[0].splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["step"] > 0
    tags = EventAccumulator(str(tmp_path / "killed" / "events")).Reload().Tags()["scalars"]
    assert [tag for tag in tags if tag.startswith(("rl_adapter/", "specdec/", "dvi/"))]


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_a_killed_run_goes_on_to_its_total(name: str, every: dict[str, Run], tmp_path: Path) -> None:
    killed(every[name], tmp_path)
    before = read_torch(tmp_path / "last" / "checkpoint.pt", "the checkpoint", "")
    assert before["num_timesteps"] < 192 and before["beside"]["history"]
    (tmp_path / "best" / "policy.safetensors.tmp").write_text("half of a file")
    every[name].train(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    steps = [json.loads(line)["timesteps"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 192


def test_a_replay_buffer_is_of_the_moment_of_its_checkpoint(every: dict[str, Run], tmp_path: Path) -> None:
    """Killed between two checkpoints, or while the second is written, the first is whole."""
    killed(every["dqn"], tmp_path, 1)
    state = read_torch(tmp_path / "last" / "checkpoint.pt", "the checkpoint", "")
    assert state["pos"] == state["num_timesteps"] == len(state["replay"]["rewards"])
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["checkpoint.pt"]


@pytest.fixture(scope="module")
def halfway(
    every: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, bytes]]]:
    """Folders of killed runs, and what they come to."""
    found = {}
    for name in ("ppo", "dqn", "dvi", "rl-adapter"):
        folder = tmp_path_factory.mktemp(name)
        killed(every[name], folder / "killed", 1)
        shutil.copytree(folder / "killed", folder / "done")
        every[name].train(folder / "done")
        found[name] = folder / "killed", weights(folder / "done")
    return found


@pytest.fixture(scope="module")
def finished(every: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Folders of trained runs, and what is loaded from them."""
    found = {}
    for name in every:
        folder = tmp_path_factory.mktemp(name) / "run"
        every[name].train(folder)
        found[name] = folder, loaded(folder)
    return found


def loaded(folder: Path) -> str:
    """What ``spec_envs.agents.load`` makes of a run, as a hash of all its numbers."""
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
    """What happens to a file."""

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


def files_of(folder: Path) -> list[Path]:
    """All that a run wrote and that is read again."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != LOCK and "events" not in str(p))


def named(error: ValueError, path: Path, folder: Path) -> bool:
    """Whether one sentence says what is damaged."""
    sentence = str(error)
    return "\n" not in sentence and (path.name in sentence or (path.name == "config.yml" and str(folder) in sentence))


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["ppo", "dqn", "dvi", "rl-adapter"])
@settings(
    max_examples=max(4, settings.default.max_examples // 3),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_damaged_folder_goes_on_as_before_or_says_what_is_damaged(
    name: str,
    every: dict[str, Run],
    halfway: dict[str, tuple[Path, dict[str, bytes]]],
    tmp_path: Path,
    data: st.DataObject,
) -> None:
    folder, expected = halfway[name]
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    path = data.draw(st.sampled_from(files_of(copy)))
    data.draw(DAMAGES).to(path)
    try:
        every[name].train(copy)
    except ValueError as error:
        assert named(error, path, copy), (path, error)
    else:
        assert weights(copy) == expected


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["ppo", "dqn", "hindsight", "dvi", "rl-adapter", "specdec++"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_run_loads_as_before_or_says_what_is_damaged(
    name: str, finished: dict[str, tuple[Path, str]], tmp_path: Path, data: st.DataObject
) -> None:
    folder, expected = finished[name]
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    readable = [path for path in files_of(copy) if path.name != "config.yml"]
    path = data.draw(st.sampled_from(readable))
    data.draw(DAMAGES).to(path)
    try:
        found = loaded(copy)
    except ValueError as error:
        assert named(error, path, copy) or path.parent.name in str(error), (path, error)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 50_000, "a: b", "- 1", "id: [1]\nenv: {}\nagent: {}\nhyperparameters: {}"]
)
def test_a_config_that_is_none_is_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(content)
    with pytest.raises(
        ValueError, match=r"^\S+ is not a readable run folder \([^\n]*\); expected one written by `make train`$"
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
def test_a_config_that_cannot_be_built_is_a_sentence(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {"id": "SpecK-v0", "env": {}, "agent": "ppo", "hyperparameters": {}} | change
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=message) as error:
        agents.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_that_is_its_own_partner_is_refused(tmp_path: Path) -> None:
    config = {"id": "SpecDepth-v0", "env": {}, "agent": "random", "hyperparameters": {}, "partner": str(tmp_path)}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="is its own partner"):
        agents.load(tmp_path)


def test_a_file_that_would_take_more_memory_than_it_has_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(10**9)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt: it is damaged \(its tensors are larger than the file\)"):
        read_torch(tmp_path / "checkpoint.pt", "the checkpoint", "delete it")


def test_files_of_others_have_no_hash_and_are_read(every: dict[str, Run], tmp_path: Path) -> None:
    every["ppo"].train(tmp_path)
    path = tmp_path / "policy.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {"decision_seconds": file.metadata()["decision_seconds"]}
    save_file(load_file(path), path, metadata)
    agents.load(tmp_path)


# Two at once


def test_a_second_run_is_refused_whatever_its_settings(every: dict[str, Run], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = Run("SpecK-v0", every["ppo"].experiment.model_copy(update={"total_timesteps": 128}))
    with held(folder):
        train.open_run(folder, train.resolved(every["ppo"].experiment, "SpecK-v0", "stanza", 0))
        before = {path: path.read_bytes() for path in files_of(folder)}
        for run in (every["ppo"], other):
            with pytest.raises(
                ValueError, match=r"run is in use by process \d+ on .*; wait until it has ended, or choose"
            ):
                run.train(folder)
        assert {path: path.read_bytes() for path in files_of(folder)} == before
    other.train(folder)  # nothing was trained there
    assert agents.read_config(folder)["total_timesteps"] == 128


def test_settings_that_fail_leave_no_folder(every: dict[str, Run], tmp_path: Path) -> None:
    bad = Run("SpecK-v0", every["ppo"].experiment.model_copy(update={"init": "nowhere"}))
    with pytest.raises(ValueError, match="cannot read the policy nowhere"):
        bad.train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


RECORDS = """
import sys
from pathlib import Path
from spec_envs.experiments.traces.record import Plan, recorded_by_default
plan = Plan("SpecK-v0", {sys.argv[2]}, (3, 1, 1))
print(recorded_by_default(plan, Path(sys.argv[1])).rows)
"""


def test_two_that_record_the_same_trace_wait_for_each_other(tiny: dict, tiny_draft: Path, tmp_path: Path) -> None:
    """The first is killed while it records; the second goes on, and both end with one trace."""
    env = {name: tiny[name] for name in ("target", "device", "dtype", "max_new_tokens")} | {"drafter": str(tiny_draft)}
    script = RECORDS.replace("{sys.argv[2]}", repr(env | {"k_max": 4}))
    command = [sys.executable, "-c", script, str(tmp_path)]
    keywords: Any = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **keywords)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("traces/*/texts/*.npz")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords) for _ in range(2)]
    first.send_signal(signal.SIGKILL)
    first.wait()
    rows = []
    for other in others:
        out, err = other.communicate(timeout=240)
        assert other.returncode == 0, err
        rows.append(int(out))
    assert rows[0] == rows[1] > 0
    assert len(list(tmp_path.glob("traces/*"))) == 1 and not list(tmp_path.rglob("texts"))


# Before and after


@pytest.mark.parametrize(
    ("env_id", "stanza", "overrides", "message"),
    [
        (
            "SpecBudget-v0",
            "expected-gain",
            ["calibrate=false"],
            "leave out calibrate=false, or name a table in env.clock",
        ),
        ("SpecBudget-v0", "ucb", ["calibrate=false"], "leave out calibrate=false, or name a table in env.clock"),
        ("SpecDepth-v0", "ppo", ["eval_env.max_new_tokens=1"], "could not be evaluated .*max_new_tokens is 1"),
        ("SpecDepth-v0", "ppo", ["eval_env.prompts=gsm9k"], "could not be evaluated .*no prompt set gsm9k"),
        ("SpecDepth-v0", "ppo", ["eval_env.clock=none"], "could not be evaluated .*no cost table 'none'"),
        ("SpecDepth-v0", "ppo", ["eval_env.target=nothing"], "could not be evaluated .*no model 'nothing'"),
        ("SpecDepth-v0", "ppo", ["partner=nowhere"], "nowhere is not a readable run folder"),
        ("SpecDepth-v0", "ppo", ["init=nowhere"], "cannot read the policy nowhere"),
        ("SpecDepth-v0", "ppo", ["checkpoint=nowhere"], "cannot read the checkpoint nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_not_trained(
    env_id: str,
    stanza: str,
    overrides: list[str],
    message: str,
    tiny: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "cost_table", lambda decoder: pytest.fail("measured before it was checked"))
    own = [f"env.{key}={value}" for key, value in tiny.items() if key != "clock"]
    with pytest.raises(ValueError, match=message):
        run_of(env_id, stanza, *own, *overrides).train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "validation")])
def test_a_data_set_without_a_split_is_refused_before_training(
    splits: tuple[str, str], tiny: dict, tmp_path: Path
) -> None:
    rows = [{"turns": [f"the {word}"], "split": split} for word in ("a", "of", "in", "is") for split in splits]
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [f"env.{key}={value}" for key, value in tiny.items()] + [f"env.data_dir={tmp_path / 'data'}"]
    run = run_of("SpecDepth-v0", "ppo", *own, "eval_freq=32")
    missing = ({"validation", "test"} - set(splits)).pop()
    with pytest.raises(ValueError, match=f"could not be evaluated .*no prompt in the split '{missing}'"):
        run.train(tmp_path / "run")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_in_one_line(number: int, status: int, tmp_path: Path) -> None:
    overrides = [f"env.trace={PROFILE}", "total_timesteps=1000000", "eval_freq=0", "checkpoint_freq=512"]
    command = [
        sys.executable,
        "-m",
        "spec_envs.experiments.train",
        "SpecK-v0",
        "--root",
        str(tmp_path),
        "--set",
        *overrides,
    ]
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "SpecK-v0" / "ppo-0" / "last" / "checkpoint.pt").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == status and "Traceback" not in err
    assert "interrupted; the same command goes on from the last checkpoint" in err.strip().splitlines()[-1]


def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(every: dict[str, Run], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(OSError, match=r"could not write .*; free some space"):
            every["ppo"].train(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run").rglob("*.tmp"))
    every["ppo"].train(tmp_path / "run")
    every["ppo"].train(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_damaged_table_of_a_finished_run_is_a_sentence(
    every: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = every["ppo"]
    train.run(run.experiment, run.env_id, "stanza", 0, tmp_path / "run")
    results = tmp_path / "run" / "results.json"
    capsys.readouterr()
    train.run(run.experiment, run.env_id, "stanza", 0, tmp_path / "run")
    table = capsys.readouterr().out
    assert "is finished" in table and "| ppo |" in table
    whole = results.read_text()
    digit = next(i for i in range(whole.index("tokens_per_second"), len(whole)) if whole[i] in "12345678")
    for damaged in ("", whole[:-9], whole[:digit] + "9" + whole[digit + 1 :], "{}", "[" * 100_000):
        results.write_text(damaged)
        with pytest.raises(ValueError, match=r"results.json .*; delete it to make the table again"):
            train.run(run.experiment, run.env_id, "stanza", 0, tmp_path / "run")


def test_what_a_run_measured_is_kept(tiny: dict, tmp_path: Path) -> None:
    """The table of a run says what it was measured on, and the time of a decision is the same when it goes on."""
    own = [f"env.{key}={value}" for key, value in tiny.items() if key != "clock"]
    small = ["total_timesteps=64", "checkpoint_freq=32", "hyperparameters.n_steps=32", "hyperparameters.batch_size=32"]
    run = run_of("SpecDepth-v0", "ppo", *own, *small, "eval_freq=0")
    killed(run, tmp_path, 1)
    table = read_sealed(tmp_path / "clock.json", "")
    assert set(table) == {"verify", "draft", "spread", "windows", "machine"} and table["spread"] >= 0
    assert {"processor", "threads", "dtype", "revision"} <= set(table["machine"])
    for part in ("verify", "draft"):
        seconds = list(table[part].values())
        assert seconds == sorted(seconds)
    decision = read_sealed(tmp_path / agents.DECISION, "")
    assert decision["how"] == "measured"
    run.train(tmp_path)
    assert read_sealed(tmp_path / "clock.json", "") == table and read_sealed(tmp_path / agents.DECISION, "") == decision
    assert agents.load(tmp_path)[1].decision_seconds == decision["seconds"]
