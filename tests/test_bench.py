from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import bench, static
from experiments.arms import Encoded, Sample
from experiments.comparison import ratio, throughput, with_aa_check
from experiments.evaluate import folder_name
from experiments.report import most_played
from spec_envs.decoding.clock import CostTable
from tests.conftest import WITHOUT_KERNELS


def test_the_benchmark_writes_its_figures_and_a_usable_clock(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(static, "DEPTHS", (1, 4))
    monkeypatch.setattr(static, "BUDGETS", (8, 16))
    arguments = ["--target", tiny["target"], "--drafter", tiny["drafter"], "--dtype", "float32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, "--count", "3", "--out", str(tmp_path)])
    bench.main()
    results = json.loads((tmp_path / "bench.json").read_text())
    assert set(results) >= {
        "plain_over_transformers",
        "static_over_plain",
        "emitted_per_cycle",
        "overhead_share",
        "static_over_assisted",
        "curves_by_dtype",
        "quality",
        "verify_curve",
        "expand_ratio",
    }
    assert results["verify_curve"]["1"] == 1.0 and results["expand_ratio"] > 0
    assert results["quality"]["float32"] == pytest.approx({**results["quality"]["float32"], "agreement": 1, "kl": 0})
    assert WITHOUT_KERNELS or results["share_of_floor"] > 0
    assert results["curves_by_dtype"]["float32"]["verify"]["96"] > 0
    assert 0 < results["overhead_share"] < 1 and results["emitted_per_cycle"] >= 1
    assert CostTable.load(str(tmp_path / "clock.json")).seconds("verify", 30) > 0
    assert (tmp_path / "bench.png").exists() and "static_over_plain" in capsys.readouterr().out


def test_ratios_are_of_sums_and_paired() -> None:
    def sample(tokens: int, seconds: float) -> Sample:
        return Sample(Encoded("t", []), tokens, seconds, 0.0, [])

    slow = [sample(10, 1.0), sample(100, 20.0), sample(50, 4.0)]
    fast = [sample(s.tokens, s.seconds / 2) for s in slow]
    assert throughput(slow) == 160 / 25
    assert ratio(fast, slow) == pytest.approx({"value": 2.0, "low": 2.0, "high": 2.0})
    noisy = [sample(s.tokens, s.seconds * f) for s, f in zip(slow, (0.4, 0.6, 0.5), strict=True)]
    found = ratio(noisy, slow)
    assert found["low"] < found["value"] < found["high"]


def test_a_run_that_disagrees_with_itself_is_repeated() -> None:
    def measure(prompts: int) -> dict[str, Any]:
        low = 1.1 if prompts < 8 else 0.9
        return {"arms": {"plain again": {"over_plain": {"low": low, "high": 1.2}}}, "prompts": prompts}

    assert "first_try" not in with_aa_check(measure, 8)
    repeated = with_aa_check(measure, 5)
    assert repeated["prompts"] == 10 and repeated["first_try"]["prompts"] == 5


def test_evaluations_have_folders_of_their_own() -> None:
    assert folder_name({"temperature": 1.0, "count": 3}) == "temperature_1.0-count_3"
    long = [folder_name({"depth": ["runs/" + "x" * 200, end]}) for end in "12"]
    assert max(map(len, long)) < 160 and long[0] != long[1]


def test_a_collapsed_policy_is_found() -> None:
    played = {"math": {"3": 0, "7": 96}, "code": {"3": 4, "7": 100}}
    assert most_played(played) == ("7", 0.98)
