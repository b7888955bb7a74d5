"""Training that is killed, interrupted or runs out of disk space resumes with the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spec_envs import agents
from spec_envs.agents.loading import DECISION
from spec_envs.experiments import runs
from spec_envs.sealed import read_sealed, read_torch
from tests.support import ROOT
from tests.support.processes import file_size_limit
from tests.support.runs import PROFILE, Run, run_of, train_until_killed, weights


@pytest.mark.parametrize("name", ["ppo", "dqn", "hindsight", "rl-adapter", "specdec++", "dvi"])
def test_training_is_reproducible(name: str, small_runs: dict[str, Run], tmp_path: Path) -> None:
    """The weights are equal even if the measured times of a decision differ."""
    for folder in ("a", "b"):
        small_runs[name].train(tmp_path / folder)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    if name != "dvi":
        logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("a", "b")]
        assert logs[0] == logs[1]
        _, agent = agents.load(tmp_path / "a")
        assert agent.decision_seconds == agents.load(tmp_path / "b")[1].decision_seconds > 0


@pytest.mark.parametrize("name", ["rl-adapter", "specdec++", "dvi"])
def test_killed_run_resumes_exactly(name: str, small_runs: dict[str, Run], tmp_path: Path) -> None:
    small_runs[name].train(tmp_path / "whole")
    train_until_killed(small_runs[name], tmp_path / "killed", 1)
    assert not runs.is_trained(tmp_path / "killed")
    small_runs[name].train(tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    logs = [(tmp_path / folder / "log.jsonl").read_text() for folder in ("whole", "killed")]
    assert logs[0] == logs[1]
    for line in logs[0].splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["step"] > 0
    tags = EventAccumulator(str(tmp_path / "killed" / "events")).Reload().Tags()["scalars"]
    assert [tag for tag in tags if tag.startswith(("rl_adapter/", "specdec/", "dvi/"))]


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_killed_run_resumes_to_its_total(name: str, small_runs: dict[str, Run], tmp_path: Path) -> None:
    train_until_killed(small_runs[name], tmp_path)
    before = read_torch(tmp_path / "last" / "checkpoint.pt", "the checkpoint", "")
    assert before["num_timesteps"] < 192 and before["beside"]["history"]
    (tmp_path / "best" / "policy.safetensors.tmp").write_text("half of a file")
    small_runs[name].train(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    steps = [json.loads(line)["timesteps"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 192


def test_replay_buffer_belongs_to_checkpoint(small_runs: dict[str, Run], tmp_path: Path) -> None:
    """A run killed between two checkpoints, or while the second is written, keeps the first complete."""
    train_until_killed(small_runs["dqn"], tmp_path, 1)
    state = read_torch(tmp_path / "last" / "checkpoint.pt", "the checkpoint", "")
    assert state["pos"] == state["num_timesteps"] == len(state["replay"]["rewards"])
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["checkpoint.pt"]


RECORDS = """
import sys
from pathlib import Path
from spec_envs.experiments.traces.plan import Plan
from spec_envs.experiments.traces.record import recorded_by_default
plan = Plan("SpecK-v0", {sys.argv[2]}, (3, 1, 1))
print(recorded_by_default(plan, Path(sys.argv[1])).rows)
"""


def test_processes_recording_one_trace_wait_for_each_other(tiny: dict, tiny_draft: Path, tmp_path: Path) -> None:
    """The first process is killed while it records; another continues, and both remaining ones return the same
    trace."""
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


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_run_with_one_line(number: int, status: int, tmp_path: Path) -> None:
    overrides = [f"env.trace={PROFILE}", "total_timesteps=1000000", "eval_freq=0", "checkpoint_freq=512"]
    command = [
        sys.executable,
        "-m",
        "spec_envs.experiments.train",
        "SpecK-v0",
        "--agent",
        "ppo-live",
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
    while not (tmp_path / "SpecK-v0" / "ppo-live-0" / "last" / "checkpoint.pt").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == status and "Traceback" not in err
    assert "interrupted; the same command continues from the last checkpoint" in err.strip().splitlines()[-1]


def test_run_resumes_after_full_disk(small_runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not write .*; free some space"), file_size_limit(6000):
        small_runs["ppo"].train(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.tmp"))
    small_runs["ppo"].train(tmp_path / "run")
    small_runs["ppo"].train(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_resumed_run_keeps_its_measurements(tiny: dict, tmp_path: Path) -> None:
    """The cost table of a run names the machine it was measured on, and a resumed run keeps it and the decision
    time."""
    own = [f"env.{key}={value}" for key, value in tiny.items() if key != "clock"]
    small = ["total_timesteps=64", "checkpoint_freq=32", "hyperparameters.n_steps=32", "hyperparameters.batch_size=32"]
    run = run_of("SpecDepth-v0", "ppo-live", *own, *small, "eval_freq=0")
    train_until_killed(run, tmp_path, 1)
    table = read_sealed(tmp_path / "clock.json", "")
    assert set(table) == {"verify", "draft", "spread", "windows", "scales", "machine"} and table["spread"] >= 0
    assert {"processor", "threads", "dtype", "revision"} <= set(table["machine"])
    for part in ("verify", "draft"):
        seconds = list(table[part].values())
        assert seconds == sorted(seconds)
    decision = read_sealed(tmp_path / DECISION, "")
    assert decision["how"] == "measured"
    run.train(tmp_path)
    assert read_sealed(tmp_path / "clock.json", "") == table and read_sealed(tmp_path / DECISION, "") == decision
    assert agents.load(tmp_path)[1].decision_seconds == decision["seconds"]
