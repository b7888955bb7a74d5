"""A run that cannot be trained or evaluated is refused before any work, and leaves no folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spec_envs import agents
from spec_envs.experiments import runs, train
from spec_envs.files import held
from tests.support.runs import Run, files_of, run_of


# Two runs in one folder
def test_folder_in_use_is_refused(small_runs: dict[str, Run], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other = Run("SpecK-v0", small_runs["ppo"].experiment.model_copy(update={"total_timesteps": 128}))
    with held(folder):
        runs.open_run(folder, runs.resolved(small_runs["ppo"].experiment, "SpecK-v0", "stanza", 0))
        before = {path: path.read_bytes() for path in files_of(folder)}
        for run in (small_runs["ppo"], other):
            with pytest.raises(
                ValueError, match=r"run is in use by process \d+ on .*; wait until it has ended, or choose"
            ):
                run.train(folder)
        assert {path: path.read_bytes() for path in files_of(folder)} == before
    other.train(folder)  # the folder has no training yet, so other settings may use it
    assert agents.read_config(folder)["total_timesteps"] == 128


def test_failed_settings_leave_no_folder(small_runs: dict[str, Run], tmp_path: Path) -> None:
    bad = Run("SpecK-v0", small_runs["ppo"].experiment.model_copy(update={"init": "nowhere"}))
    with pytest.raises(ValueError, match="cannot read the policy nowhere"):
        bad.train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Evaluation is checked before training
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
        ("SpecDepth-v0", "ppo", ["eval_env.max_new_tokens=1"], "SET: max_new_tokens is 1"),
        ("SpecDepth-v0", "ppo", ["eval_env.prompts=gsm9k"], "could not be evaluated: .*no prompt set gsm9k"),
        ("SpecDepth-v0", "ppo", ["eval_env.clock=none"], "could not be evaluated: .*no cost table 'none'"),
        ("SpecDepth-v0", "ppo", ["eval_env.target=nothing"], "could not be evaluated: .*no model 'nothing'"),
        ("SpecDepth-v0", "ppo", ["partner=nowhere"], "nowhere is not a readable run folder"),
        ("SpecDepth-v0", "ppo", ["init=nowhere"], "cannot read the policy nowhere"),
        ("SpecDepth-v0", "ppo", ["checkpoint=nowhere"], "cannot read the checkpoint nowhere"),
    ],
)
def test_settings_that_cannot_be_evaluated_are_not_trained(
    env_id: str,
    stanza: str,
    overrides: list[str],
    message: str,
    tiny: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "price_list", lambda *_: pytest.fail("measured before it was checked"))
    own = [f"env.{key}={value}" for key, value in tiny.items() if key != "clock"]
    with pytest.raises(ValueError, match=message):
        run_of(env_id, stanza, *own, *overrides).train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "validation")])
def test_data_set_without_split_is_refused_before_training(splits: tuple[str, str], tiny: dict, tmp_path: Path) -> None:
    rows = [{"turns": [f"the {word}"], "split": split} for word in ("a", "of", "in", "is") for split in splits]
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [f"env.{key}={value}" for key, value in tiny.items()] + [f"env.data_dir={tmp_path / 'data'}"]
    run = run_of("SpecDepth-v0", "ppo", *own, "eval_freq=32")
    missing = ({"validation", "test"} - set(splits)).pop()
    with pytest.raises(ValueError, match=f"could not be evaluated: .*no prompt in the split '{missing}'"):
        run.train(tmp_path / "run")
