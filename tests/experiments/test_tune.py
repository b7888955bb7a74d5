"""Tuning resumes wherever it was interrupted, and ends with the same settings."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from spec_envs.agents.sb3.agent import SB3Agent
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments import tune
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.traces.plan import default_folder
from spec_envs.files import held
from tests.support.recordings import recorded_at_costs
from tests.support.runs import SMALL as FEW_LESSONS
from tests.support.runs import Killed

SETTINGS = ["env.trace=qwen2.5-coder-32b-cpu", "env.decision=token"]
TRIALS = 14  # the last four are drawn by the values of the others


def tuned(root: Path, trials: int = TRIALS, **changes: int) -> Path:
    sizes = {"prompts": 2, "tokens": 24} | changes
    tune.tune("SpecK-v0", "svip", SETTINGS, trials, sizes["prompts"], sizes["tokens"], root)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tmp_path_factory.mktemp("whole") / "svip")


def test_writes_settings_and_removes_temporary_files(whole: Path) -> None:
    assert {"best.yml", "clock.json", "history.png", "settings.json", "study.log"} < {p.name for p in whole.iterdir()}
    assert not list(whole.glob("*.tmp")) and not list(whole.glob("study.log.*"))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.37, 0.99])
def test_tuning_resumes_from_truncated_journal(
    share: float, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is cut off anywhere, and Optuna's own lock remains from another version with a target that does
    not exist here."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/svip")
    folder.mkdir(parents=True)
    journal = (whole / "study.log").read_bytes()
    (folder / "study.log").write_bytes(journal[: round(share * len(journal))])
    for name in ("settings.json", "clock.json"):
        (folder / name).write_bytes((whole / name).read_bytes())
    (folder / "study.log.lock").symlink_to("runs/svip/study.log")
    (folder / "study.log.lock1234.rename").symlink_to("runs/svip/study.log")
    (folder / "best.yml.tmp").write_text("cut sh")
    tuned(folder)
    assert (folder / "best.yml").read_bytes() == (whole / "best.yml").read_bytes()
    assert not [path.name for path in folder.iterdir() if path.name.startswith("study.log.") or path.suffix == ".tmp"]
    assert len(tune.finished(tune.opened(folder))) == TRIALS


def test_trials_in_several_calls_give_same_result(tmp_path: Path, whole: Path) -> None:
    for trials in (1, 3, TRIALS):
        tuned(tmp_path / "svip", trials)
    assert (tmp_path / "svip" / "best.yml").read_bytes() == (whole / "best.yml").read_bytes()


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    with held(tmp_path / "svip"), pytest.raises(ValueError, match=rf"svip is in use by process {os.getpid()}"):
        tuned(tmp_path / "svip", 1)


def test_folders_with_other_or_damaged_content_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was begun with another tokens; choose another --root, or delete it"):
        tuned(whole, tokens=25)
    folder = tuned(tmp_path / "svip", 1)
    (folder / "study.log").write_bytes(b"nonsense\n" + (folder / "study.log").read_bytes())
    with pytest.raises(ValueError, match=r"study.log is damaged \(.*\); delete .*svip to tune again"):
        tuned(folder, 2)
    (folder / "settings.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"settings.json is damaged \(it is nested too deeply\); delete "):
        tuned(folder, 2)
    (other := tmp_path / "other").mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"other holds something else, thesis.tex; choose another --root"):
        tuned(other, 1)
    assert [path.name for path in other.iterdir() if path.suffix != ".lock" and path.name != ".lock"] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("stanza", "settings", "reason"),
    [
        ("random", [], "random has nothing to tune here; expected a published rule, an agent of Stable-Baselines3"),
        ("ppo", SETTINGS, "ppo is trained in every trial, on recorded texts; expected record"),
        ("dqn", [], "dqn is trained in every trial, on recorded texts; expected record"),
        ("svip", [*SETTINGS, "env.prompts=gsm9k", "env.trace=null"], "no prompt set gsm9k"),
    ],
)
def test_refused_stanza_leaves_no_folder(stanza: str, settings: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        tune.tune("SpecK-v0", stanza, settings, 1, 2, 24, tmp_path / "tune" / "SpecK-v0" / stanza)
    assert not list(tmp_path.iterdir())


SMALL = {
    "ppo": {"num_envs": 4, "n_steps": 16, "batch_size": 32, "n_epochs": 1, "pi_arch": [8], "vf_arch": [8]},
    "hindsight": FEW_LESSONS | {"rounds": 1},
    "exact-pg": FEW_LESSONS | {"rounds": 1},
}


def learned(name: str, trace: Trace, root: Path, trials: int = 3, *changes: str) -> Path:
    """Tune an agent that every trial trains on a trace, and return the folder of the study."""
    folder = root / "tune" / "SpecK-v0" / name
    given = [f"env.trace={trace.folder}", "env.k_max=6", "env.max_new_tokens=20", "total_timesteps=128", *changes]
    given += [f"hyperparameters.{key}={json.dumps(value)}".replace(" ", "") for key, value in SMALL[name].items()]
    tune.tune("SpecK-v0", name, given, trials, 12, 64, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "tuned", "budget"),
    [
        (
            "ppo",
            {"learning_rate", "ent_coef", "n_steps", "gae_lambda", "reward_floor", "draft_chance"},
            "128 decisions",
        ),
        ("hindsight", {"steps", "learning_rate", "hidden"}, "every choice"),
        ("exact-pg", {"steps", "learning_rate", "hidden"}, "every choice"),
    ],
)
def test_trained_agents_are_tuned_on_a_trace(
    name: str,
    tuned: set[str],
    budget: str,
    traces: dict[str, Trace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, made = tune.trained_anew, list[Any]()

    def trained(*given: Any) -> Any:
        made.append(train(*given))
        return made[-1]

    monkeypatch.setattr(tune, "trained_anew", trained)
    folder = learned(name, traces["copies"], tmp_path)
    note = (folder / "best.yml").read_text()
    first, best = note.splitlines()[0], yaml.safe_load(note)["hyperparameters"]
    assert first == (
        f"# Budget: 3 trials, each trained on {budget} in 4 texts and replayed 1 validation text of at most 24 tokens"
    )
    done = tune.finished(tune.opened(folder))
    assert [set(trial.params) for trial in done] == [tuned] * 3 and set(best) >= tuned | set(SMALL[name])
    for trial, agent in zip(done, made, strict=True):
        assert {key: dict(agent.settings)[key] for key in tuned} == trial.params and agent.settings.seed == 0
    assert name == "ppo" or len({trial.value for trial in done}) > 1  # so few decisions teach PPO nothing
    load_experiment("SpecK-v0", name, [f"hyperparameters.{key}={json.dumps(value)}" for key, value in best.items()])
    again = learned(name, traces["copies"], tmp_path / "again", 1)
    assert learned(name, traces["copies"], tmp_path / "again") == again
    assert (again / "best.yml").read_text() == note


def test_score_is_that_of_validation_texts_with_decisions(traces: dict[str, Trace], tmp_path: Path) -> None:
    """A decision that takes longer makes every trial slower."""
    trace = traces["copies"]
    scores = []
    for seconds in (0.0, 1.0):
        folder = learned("hindsight", trace, tmp_path / str(seconds), 1, f"env.policy_seconds={seconds}")
        scores.append(tune.finished(tune.opened(folder))[0].value)
    tokens = sum(min(trace.texts[i].tokens, 24) - 1 for i in trace.of_split("validation"))
    assert scores[1] < 1.0 < scores[0] and tokens / scores[1] > tokens / scores[0] + 1


def test_killed_training_of_a_trial_is_repeated(
    traces: dict[str, Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learned("ppo", traces["copies"], tmp_path / "whole")
    learn, calls = SB3Agent.learn, itertools.count()

    def killed(*given: Any) -> Any:
        if next(calls) == 1:
            raise Killed
        return learn(*given)

    monkeypatch.setattr(SB3Agent, "learn", killed)
    with pytest.raises(Killed):
        learned("ppo", traces["copies"], tmp_path / "killed")
    folder = learned("ppo", traces["copies"], tmp_path / "killed")
    assert (folder / "best.yml").read_bytes() == (whole / "best.yml").read_bytes()
    assert len(tune.finished(tune.opened(folder))) == 3


@pytest.mark.parametrize("by_run", [False, True])
def test_trace_is_recorded_once(by_run: bool, plans: dict[str, Any], tmp_path: Path) -> None:
    """It is that of a run with the same settings, or lies beside the studies."""
    plan = replace(plans["copies"], env=plans["copies"].env | {"prompts": "all"})
    runs, folder = tmp_path / "runs", tmp_path / "runs" / "tune" / "SpecK-v0" / "hindsight"
    root = runs if by_run else runs / "tune"
    trace = recorded_at_costs(plan, default_folder(plan, root))
    changes = [f"env.{key}={value}" for key, value in plan.env.items()] + [
        f"record={list(plan.texts)}".replace(" ", ""),
    ]
    changes += [f"hyperparameters.{key}={value}" for key, value in FEW_LESSONS.items()]
    tune.tune("SpecK-v0", "hindsight", changes, 1, 12, 64, folder)
    assert CostTable.load(str(folder / "clock.json")).curves == trace.costs().curves
    assert [path.parent for path in runs.rglob("manifest.json")] == [trace.folder]
