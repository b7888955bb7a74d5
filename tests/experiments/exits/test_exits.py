"""The commands around an exit from end to end, over the tiny target."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spec_envs import agents, generate
from spec_envs.controls import candidates
from spec_envs.decoding.loading import load_decoder
from spec_envs.experiments import dvi, evaluate, stream, train
from spec_envs.experiments.comparisons import exits as comparison
from spec_envs.experiments.exits import runs as exit_runs
from spec_envs.experiments.stanzas import ExperimentFile
from spec_envs.prompts.conversations import read_log
from tests.support.commands import run_command

KEYS = {"accept_rate_before", "accept_rate_after", "emitted_per_cycle_before", "emitted_per_cycle_after"}
KEYS |= {"tokens_per_s", "plain_tokens_per_s", "perplexity", "drift"}
SMALL = ["eval_prompts=2", "test_prompts=3", "hyperparameters.fast_batch=16", "hyperparameters.replay_batch=16"]


@pytest.fixture(autouse=True)
def tiny_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the candidate lengths, and fix the user turns, because a random target writes no sensible ones."""
    monkeypatch.setattr(candidates, "KS", (0, 1, 3))
    monkeypatch.setattr(exit_runs, "sampled_turns", lambda *arguments: ["the a of", "in to is"])


def settings(tiny: dict) -> list[str]:
    kept = {key: value for key, value in tiny.items() if key != "drafter"}
    return [*(f"env.{key}={value}" for key, value in kept.items()), "env.exit_layer=3", "env.clock=wall", *SMALL]


def test_run_writes_table_and_usable_drafter(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("own_text=12", "hyperparameters.texts=12", "eval_freq=60", "checkpoint_freq=60")
    arguments = ["SpecDVI-v0", "--root", str(tmp_path), "--set", *settings(tiny), *own]
    run_command(monkeypatch, train, *arguments)
    assert ExperimentFile.of("SpecDVI-v0").first == "dvi"
    folder, table = tmp_path / "SpecDVI-v0" / "dvi-0", capsys.readouterr().out
    for arm in (
        "plain",
        "plain again",
        "transformers generate",
        "untrained exit",
        "trained exit",
        "trained exit, up to 6, stop below 0.6",
        "dvi",
    ):
        assert re.search(rf"^\| {re.escape(arm)} +\|", table, re.M)
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())
    assert set(results["exit"]) >= KEYS and results["exit"]["drift"] == 0.0
    assert set(results["exit"]["same_text"].values()) == {1.0}
    assert len(read_log(folder / "conversations.jsonl")) == 12
    events = EventAccumulator(str(folder / "events")).Reload().Tags()["scalars"]
    assert set(events) >= {
        "dvi/accept_rate",
        "dvi/loss_rl",
        "dvi/loss_slow",
        "dvi/ppl_sample",
        "validation/accept_rate",
    }
    validated = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert validated[0]["step"] == 0 and len(validated) > 2

    control, agent = agents.load(folder)
    decoder = load_decoder(tiny["target"], str(folder), "cpu", "float32", width=1, max_depth=control.max_depth)
    done = generate(decoder, control, agent, [2, 3, 4], 20).run()
    assert done.tokens == generate(decoder.plain(), None, None, [2, 3, 4], 20).run().tokens

    run_command(monkeypatch, stream, "the a of", "--run", str(folder), "--max-new-tokens", "12")
    assert "12 tokens, " in capsys.readouterr().out

    run_command(monkeypatch, train, *arguments)
    assert "is finished" in capsys.readouterr().out
    run_command(monkeypatch, evaluate, str(folder), "--count", "2", "--temperature", "1.0")
    assert "temperature 1.0" in " ".join(capsys.readouterr().out.split())
    (folder / "exit.json").unlink()
    with pytest.raises(SystemExit, match=r"exit.json is damaged or missing"):
        run_command(monkeypatch, evaluate, str(folder), "--count", "2")
    with pytest.raises(SystemExit, match="checkpoint is 'runs/other', which the agent dvi does not take"):
        run_command(
            monkeypatch,
            train,
            "SpecDVI-v0",
            "--root",
            str(tmp_path / "b"),
            "--set",
            "checkpoint=runs/other",
            *settings(tiny),
        )


def test_flags_set_keys_of_the_stanza(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"conversations": [{"from": "human", "value": f"the {w}"}]} for w in ("a", "of", "in", "is", "it", "on")]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join([*map(json.dumps, rows), "not a conversation"]))
    flags = {
        **{"--model_name": tiny["target"], "--exit_layer": "3", "--fast_batch": "8", "--slow_every": "2"},
        **{"--beta_kl": "0.2", "--baseline_momentum": "0.8", "--texts": "6", "--dtype": "float32"},
        **{"--max_new_tokens": "24", "--test_prompts": "3", "--conversations": str(log)},
        **{"--root": str(tmp_path / "runs"), "--results": str(tmp_path / "results")},
    }
    small = ["--set", "env.device=cpu", "eval_prompts=2", "eval_freq=0"]
    run_command(monkeypatch, dvi, *(text for pair in flags.items() for text in pair), *small)
    assert "left out 1 of 7 rows that are no conversation (line 7)" in caplog.text
    found = json.loads((tmp_path / "results" / "reinforce-0.json").read_text())
    assert set(found) >= KEYS and found["adapter"] == "layers" and found["exit_layer"] == 3
    config = yaml.safe_load((tmp_path / "runs" / "SpecDVI-v0" / "reinforce-0" / "config.yml").read_text())
    own = {"fast_batch": 8, "slow_every": 2, "beta_kl": 0.2, "baseline_momentum": 0.8, "texts": 6, "order": "logged"}
    assert own.items() <= config["hyperparameters"].items()
    assert config["env"]["target"] == tiny["target"] and config["env"]["max_new_tokens"] == 24

    with pytest.raises(SystemExit, match="unknown hyper-parameter 'beta_kl' of dvi"):
        run_command(monkeypatch, dvi, "--agent", "dvi", "--beta_kl", "0.2")
    with pytest.raises(SystemExit, match="exit_layer is 30; expected 1 to 29"):
        run_command(monkeypatch, dvi, "--exit_layer", "30", "--root", str(tmp_path / "other"))
    assert not (tmp_path / "other").exists() or not any((tmp_path / "other").rglob("config.yml"))


def test_results_of_another_run_are_not_overwritten(
    tmp_path: Path, tiny: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "dvi-0.json").write_text(json.dumps({"run": str(tmp_path / "a" / "SpecDVI-v0" / "dvi-0")}))
    monkeypatch.setattr(dvi, "trained", lambda *_: pytest.fail("trained before it was checked"))
    with pytest.raises(SystemExit, match=r"dvi-0.json holds the results of another run, .*; choose another --results"):
        run_command(monkeypatch, dvi, "--root", str(tmp_path / "b"), "--results", str(results))


def test_comparison_writes_learning_curves(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path),
        "--stanzas",
        "dvi",
        "reinforce",
        "--seeds",
        "0",
        "1",
        "--texts",
        "6",
    ]
    arguments += ["--count", "2", "--k", "2", "--eval-freq", "40", "--set", *settings(tiny)]
    run_command(monkeypatch, comparison, *arguments)
    page = (tmp_path / "exits.md").read_text()
    assert page in capsys.readouterr().out
    found = json.loads((tmp_path / "exits.json").read_text())
    for stanza in ("dvi", "reinforce"):
        assert f"| {stanza} |" in page and len(found["stanzas"][stanza]) == 2
        assert all(len(row["curve"]) > 1 and row["curve"][-1]["texts"] == 6 for row in found["stanzas"][stanza])
    assert found["stanzas"]["dvi"][0]["drift"] == 0.0 < found["stanzas"]["reinforce"][0]["drift"]
    assert (tmp_path / "exits.png").read_bytes().startswith(b"\x89PNG")
