"""The experiment commands from end to end, over the tiny models."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spec_envs import agents
from spec_envs.controls import candidates
from spec_envs.decoding.clock import CostTable
from spec_envs.experiments import evaluate, runs, stream, train
from tests.support import ROOT
from tests.support.commands import run_command


def command(env_id: str, agent: str, root: Path, tiny: dict, *settings: str) -> list[str]:
    overrides = [f"env.{key}={value}" for key, value in tiny.items()]
    small = ["test_prompts=3", "eval_prompts=2", "hyperparameters.n_steps=32", "hyperparameters.batch_size=32"]
    return [env_id, "--agent", agent, "--root", str(root), "--set", *overrides, *small, *settings]


@pytest.fixture(autouse=True)
def few_static_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "DEPTHS", (2, 4))
    monkeypatch.setattr(candidates, "BUDGETS", (7, 15))


def run_config_of(config: dict) -> runs.RunConfig:
    return runs.RunConfig(**{field.name: config[field.name] for field in dataclasses.fields(runs.RunConfig)})


def run_train(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    run_command(monkeypatch, train, *arguments)


@pytest.mark.parametrize("env_id", ["SpecDepth-v0", "SpecBudget-v0"])
def test_train_writes_results_and_resumable_run(
    env_id: str, tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("total_timesteps=128", "eval_freq=64", "checkpoint_freq=32", "env.clock=wall")
    arguments = command(env_id, "ppo-live", tmp_path, tiny, *settings)
    run_train(monkeypatch, arguments)
    folder = tmp_path / env_id / "ppo-live-0"
    table = capsys.readouterr().out
    for arm in ("plain", "plain again", "transformers generate", "random", "static", "static again", "ppo"):
        assert re.search(rf"^\| {re.escape(arm)} +\|", table, re.M)
    results = json.loads((folder / "results.json").read_text())
    low, value, high = (results["arms"]["ppo"]["over_plain"][k] for k in ("low", "value", "high"))
    assert low <= value <= high
    assert results["divergences"]["ppo"] == {"per_1000": 0.0, "largest_gap": 0.0, "same_text": 1.0}
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((folder / "config.yml").read_text())
    assert config["versions"]["torch"] and config["revision"] and config["hyperparameters"]["gamma"] == 1.0
    events = EventAccumulator(str(next(folder.glob("events_*"))), size_guidance={"histograms": 0}).Reload().Tags()
    assert set(events["scalars"]) >= {
        *(f"spec/{name}" for name in ("tokens_per_second", "speedup", "emitted_per_cycle", "acceptance")),
        *(f"spec/seconds_{part}" for part in ("draft", "verify", "policy")),
    }
    assert any(tag.startswith("actions/") for tag in events["histograms"])
    assert [json.loads(line)["timesteps"] for line in (folder / "log.jsonl").read_text().splitlines()][-1] == 128
    assert CostTable.load(str(folder / "clock.json")).seconds("verify", 1) > 0
    agents.load(folder)

    run_train(monkeypatch, arguments)
    assert "is finished" in capsys.readouterr().out
    (untrained := tmp_path / env_id / "ppo-1").mkdir()
    (untrained / "config.yml").write_text((folder / "config.yml").read_text())
    runs.open_run(
        untrained, dataclasses.replace(run_config_of(config), seed=1)
    )  # the folder has no training yet, so other settings may use it
    assert agents.read_config(untrained)["seed"] == 1
    with pytest.raises(
        SystemExit, match=r"holds a run with other settings: hyperparameters\..*, total_timesteps 128 instead of 256"
    ):
        run_train(monkeypatch, [*arguments, "total_timesteps=256"])

    run_command(monkeypatch, evaluate, folder, "--count", "3", "--temperature", "1.0")
    assert "temperature 1.0" in " ".join(capsys.readouterr().out.split())
    run_command(monkeypatch, evaluate, folder, "--count", "2")  # with fewer prompts than the run's, its own table stays
    assert (folder / "eval" / "count_2" / "results.md").exists()
    assert json.loads((folder / "results.json").read_text()) == results
    run_command(monkeypatch, stream, "the a of", "--run", folder, "--max-new-tokens", "12")
    assert "12 tokens" in capsys.readouterr().out
    models = ["--target", tiny["target"], "--drafter", "lookup", "--dtype", "float32"]
    run_command(monkeypatch, stream, "the a of", *models, "--max-new-tokens", "12")
    assert "12 tokens" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="'lookup' drafts a chain, not a tree"):
        run_command(monkeypatch, stream, "the a of", "--run", folder, "--drafter", "lookup")


def test_failed_settings_leave_no_folder(tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [f"env.{key}={value}" for key, value in tiny.items()]
    arguments = ["SpecDepth-v0", "--agent", "fixed", "--root", str(tmp_path), "--set", "test_prompts=3", *overrides]
    with pytest.raises(SystemExit, match="no prompt set gsm9k"):
        run_train(monkeypatch, [*arguments, "env.prompts=gsm9k"])
    with pytest.raises(SystemExit, match="value is 99"):
        run_train(monkeypatch, [*arguments, "hyperparameters.value=99"])
    with pytest.raises(SystemExit, match="nowhere is not a readable run folder"):
        run_train(monkeypatch, [*arguments, "partner=nowhere"])
    assert not (tmp_path / "SpecDepth-v0" / "fixed-0").exists()
    run_train(monkeypatch, arguments)
    assert (tmp_path / "SpecDepth-v0" / "fixed-0" / "results.json").exists()


def test_cost_features_are_same_in_training_and_use(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A policy that observes a cost table is trained with the calibrated one and observes the same one in use."""
    arguments = command("SpecDepth-v0", "ppo-live", tmp_path, tiny, "total_timesteps=64", "eval_freq=32")
    run_train(monkeypatch, [*arguments, "env.cost_features=true", "env.clock=wall"])
    folder = tmp_path / "SpecDepth-v0" / "ppo-live-0"
    control, _ = agents.load(folder)
    assert control.costs == CostTable.load(str(folder / "clock.json"))
    run_command(monkeypatch, stream, "the a of", "--run", folder, "--max-new-tokens", "12")
    assert "12 tokens" in capsys.readouterr().out


def test_killed_run_resumes(tiny: dict, tmp_path: Path) -> None:
    arguments = command(
        "SpecDepth-v0", "ppo-live", tmp_path, tiny, "total_timesteps=1024", "checkpoint_freq=64", "eval_freq=0"
    )
    run = [sys.executable, "-m", "spec_envs.experiments.train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "SpecDepth-v0" / "ppo-live-0"
    first = subprocess.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "last" / "checkpoint.pt").exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (folder / "results.json").exists()
    again = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "from its last checkpoint" in again.stderr
    steps = [json.loads(line)["timesteps"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 1024
    assert (folder / "results.json").exists()


def test_mixes_of_learned_and_fixed_policies(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for env_id, *stated in (("SpecDepth-v0", "env.max_depth=12", "env.width=10"), ("SpecBudget-v0",)):
        run_train(
            monkeypatch, command(env_id, "ppo-live", tmp_path, tiny, "total_timesteps=32", "eval_freq=0", *stated)
        )
        runs.append(str(tmp_path / env_id / "ppo-live-0"))
    out = tmp_path / "mixes"
    mixes = ["--depth", f"3 {runs[0]}", "--budget", f"16 {runs[1]}", "--count", "3", "--out", str(out)]
    run_command(monkeypatch, evaluate, *mixes, "--clock", tiny["clock"], "--dtype", "float32")
    arms = json.loads((out / "results.json").read_text())["arms"]
    assert len([name for name in arms if name.startswith("depth")]) == 4
    with pytest.raises(SystemExit, match="is a run of SpecBudget-v0; give runs"):
        run_command(monkeypatch, evaluate, "--depth", runs[1], "--budget", "16")
    with pytest.raises(SystemExit, match="depth is 20; expected 0 to 12"):
        run_command(monkeypatch, evaluate, "--depth", "20", "--budget", runs[1])


def test_unknown_environment_and_run_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: no environment 'SpecDept-v0'"):
        run_train(monkeypatch, ["SpecDept-v0"])
    with pytest.raises(SystemExit, match="is not a readable run folder"):
        run_command(monkeypatch, evaluate, tmp_path)


def test_evaluation_settings_without_effect_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that is misspelt or has no effect is refused, and nothing is written."""
    small = ["total_timesteps=64", "test_prompts=3", "hyperparameters.value=2"]
    profile = "env.trace=qwen2.5-coder-32b-cpu"
    run_train(monkeypatch, ["SpecK-v0", "--agent", "fixed", "--root", str(tmp_path), "--set", profile, *small])
    run = tmp_path / "SpecK-v0" / "fixed-0"
    before = sorted(run.rglob("*"))
    for arguments, sentence in (
        ([run, "--prompts", "gsm8k"], "the trace 'qwen2.5-coder-32b-cpu' has no texts of the prompts 'gsm8k'; it has "),
        ([run, "--temperature", "1", "--dtype", "int8"], "dtype, temperature cannot be set"),
        ([run, "--count", "0"], "--count is 0; expected 2 or more"),
        ([run, "--temperature", "nan"], "--temperature is nan; expected 0 or more"),
        ([run, "--max-new-tokens", "-3"], "--max-new-tokens is -3; expected 2 to"),
        ([run, "--data-dir", tmp_path / "nowhere"], "nowhere' is not a folder"),
        ([run, "--depth", "1"], "give a run, or depths and budgets, not both"),
        (["--depth", " ", "--budget", ""], "nothing to evaluate"),
        (["--depth", "1", "--prompts", "gsm8"], "no prompt set gsm8"),
        ([run, run], "unrecognized arguments"),
        ([tmp_path / "nowhere"], "nowhere is not a readable run folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_command(monkeypatch, evaluate, *arguments)
        assert sentence in str(ended.value), (arguments, str(ended.value))
    assert sorted(run.rglob("*")) == before and not capsys.readouterr().err.count("Traceback")
