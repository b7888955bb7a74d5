"""The comparison of drafters, on the tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spec_envs.controls import Control, candidates
from spec_envs.controls.depth import DepthControl
from spec_envs.experiments.comparisons import drafters
from spec_envs.experiments.measure.results import Best
from tests.support.commands import run_command


def test_every_drafter_is_measured_at_its_best_setting(
    tiny: dict, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def best_static(env: dict, control: Control) -> Best:  # no search, whose choice depends on the clock
        return Best(best=[1, 3] if isinstance(control, DepthControl) else [2], tokens_per_second={"": 1.0})

    monkeypatch.setattr(drafters, "best_static", best_static)
    head, names = tiny["drafter"], [tiny["drafter"], str(tiny_draft), "lookup", "lookup"]
    models = ["--target", tiny["target"], "--dtype", "float32", "--device", "cpu"]
    run_command(monkeypatch, drafters, "--drafters", *names, *models, "--count", "3", "--out", tmp_path)
    results, page = json.loads((tmp_path / "drafters.json").read_text()), (tmp_path / "drafters.md").read_text()
    compared = [f"{head} (trees)", f"{head} (chains)", str(tiny_draft), "lookup"]
    assert list(results["static"]) == compared and results["first"] == compared[0]
    assert list(results["arms"]) == ["plain", "plain again", *compared, f"{compared[0]} again"]
    for arm in compared:
        best = 3 if arm.endswith("(trees)") else 2
        assert results["chosen"][arm] == ("depth 1, budget 3" if best == 3 else "k 2")
        most = best if arm.startswith(head) else 4 * best  # a draft model's tokens have three alternatives each
        if arm != "lookup":  # which copies as many as there are
            assert best - 0.5 <= results["arms"][arm]["verified_per_cycle"] <= most
        assert results["same_text"][arm] == 1.0  # no drafter changes the text
        assert results["arms"][arm]["over_plain"]["value"] > 0 and f"| {arm} | {results['chosen'][arm]} |" in page
    assert page in capsys.readouterr().out and (tmp_path / "drafters.png").exists()


def test_prompts_of_ones_own(tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "KS", (1, 4))
    for task in ("letters", "recipes"):
        (tmp_path / task).mkdir()
        lines = [json.dumps({"turns": [f"{task} number {i}"]}) for i in range(40)]
        (tmp_path / task / "question.jsonl").write_text("\n".join(lines))
    where = ["--data-dir", tmp_path, "--prompts", "recipes", "--out", tmp_path]
    models = ["--target", tiny["target"], "--dtype", "float32", "--device", "cpu"]
    run_command(monkeypatch, drafters, "--drafters", "lookup", *models, "--count", "2", *where)
    assert set(json.loads((tmp_path / "drafters.json").read_text())["by_task"]["plain"]) == {"recipes"}


def test_unknown_drafters_are_refused_before_anything_is_measured(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafters, "best_static", lambda *_: pytest.fail("measured"))
    given = ["--target", tiny["target"], "--drafters", "lookup", "no-such-drafter", "--out", tmp_path]
    with pytest.raises(SystemExit, match=r"error: .*no-such-drafter"):
        run_command(monkeypatch, drafters, *given)
    assert not list(tmp_path.iterdir())


def test_all_known_drafters_of_a_target_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(env: dict, names: list[str], count: int) -> None:
        raise ValueError(f"{env['target']}: {', '.join(names)}")

    monkeypatch.setattr(drafters, "compare_drafters", compared)
    with pytest.raises(SystemExit, match=r"error: smollm2-135m: lookup\+smollm2-135m-eagle3, .*draft, lookup, suffix$"):
        run_command(monkeypatch, drafters)
