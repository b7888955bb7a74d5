"""The comparison of draft lengths on the synthetic profile."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from spec_envs.experiments.comparisons import chains

NAME = "qwen2.5-coder-32b-cpu"
KEYS = {"best_fixed_over_plain", "best_agent", "best_agent_over_best_fixed", "by_context", "variation", "acceptance"}


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str, name: str = "chains") -> dict:
    """Run the comparison on the profile, and return the results in NAME.json."""
    common = ["chains", "--trace", NAME, "--count", "10", "--out", str(tmp_path), "--root", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [*common, *arguments])
    chains.main()
    return json.loads((tmp_path / f"{name}.json").read_text())


def test_results_are_consistent_with_arms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(monkeypatch, tmp_path, "--agents", "hf-schedule,confidence,random")
    arms = results["arms"]
    assert set(arms) == {
        *("plain", "plain again", "K = 4", "K = 8", "K = 16", "best fixed", "hf-schedule", "confidence", "random")
    }
    assert set(results) >= KEYS and results["best_agent"] in ("hf-schedule", "confidence", "random")
    assert results["best_fixed_over_plain"] == arms["best fixed"]["over_plain"]
    assert results["best_agent_over_best_fixed"] == arms[results["best_agent"]]["over_best fixed"]
    assert arms["plain"]["tokens_per_second"] == pytest.approx(1 / 0.36)
    assert set(results["by_context"]["K = 4"]) == {"code", "prose", "math"}
    fixed = results["static"]["tokens_per_second"]
    assert f"k {results['static']['best'][0]}" == max(fixed, key=fixed.get)
    assert results["agents"] == {"hf-schedule": "hf-schedule", "confidence": "confidence", "random": "random"}
    page = (tmp_path / "chains.md").read_text()
    assert "| K = 16 " in page and "The best agent on validation prompts" in page
    assert "- `K = 8`: a chain of 8 tokens" in page and "[`confidence`](../agents/rules.md), a published rule" in page
    assert page in capsys.readouterr().out and (tmp_path / "chains.png").stat().st_size > 10_000

    other = run(monkeypatch, tmp_path, "--agents", "svip", "--name", "qwen", name="chains-qwen")
    assert other["best_agent"] == "svip" and (tmp_path / "chains-qwen.md").exists()
    assert json.loads((tmp_path / "chains.json").read_text()) == results


@pytest.mark.parametrize("name", ["a/b", "", "a b"])
def test_name_of_other_files_is_part_of_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(SystemExit, match="expected letters, digits, points and dashes"):
        run(monkeypatch, tmp_path, "--name", name)


def test_unknown_stanza_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"has no stanza 'svib' \(did you mean 'svip'\?\)"):
        run(monkeypatch, tmp_path, "--agents", "svib")
    assert not (tmp_path / "chains.json").exists()


@pytest.mark.parametrize(
    ("stanza", "message"),
    [("ppo-live", "ppo-live is trained to decide every cycle"), ("ppo-token", "leave out adjustment_interval")],
)
def test_policies_per_cycle_or_token_are_refused_on_server(tmp_path: Path, stanza: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chains.policy_of(stanza, chains.experiment_for(stanza, {"engine": "llama-server"}), tmp_path)
    assert not list(tmp_path.iterdir())
