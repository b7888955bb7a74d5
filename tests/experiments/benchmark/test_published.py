"""The published results: texts of the final split, the count of its uses, and the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.benchmark import __main__ as command
from spec_envs.experiments.benchmark import arms, replay, report, results
from spec_envs.experiments.benchmark.findings import Benchmark
from spec_envs.experiments.benchmark.problems import Size
from spec_envs.experiments.measure import machine, statistics, tables
from spec_envs.experiments.measure.arms import Encoded
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.measure.results import Interval
from spec_envs.experiments.traces import record
from spec_envs.experiments.traces.plan import Plan, default_folder
from spec_envs.files import write_json
from tests.docs.constructed import findings
from tests.support.recordings import COSTS, TEXTS, recorded_at_costs

TINY = Size(TEXTS, 20, 1, 1, 512, 128, 2, 2, 20, 2)
REVISION = "0123abc"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a clone of revision ``REVISION`` in which the final split was used once."""
    folder = tmp_path / "clone"
    (folder / results.OUT).mkdir(parents=True)
    write_json(folder / results.USES, [{"revision": "fedcba9", "date": "2026-01-01", "problems": ["SpecK-v0"]}])
    monkeypatch.setattr(results, "CLONE", folder)
    for module in (results, machine):
        monkeypatch.setattr(module, "revision", lambda: REVISION)
    return folder


@pytest.fixture
def run(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs the command with further arguments."""

    def call(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["spec-envs results", "--root", str(tmp_path / "runs"), *words])
        results.main()

    return call


def priced(decoder: Any, control: Any, env: Any, file: Path) -> Path:
    """Write a price list without measuring, and return its file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**COSTS, "verify": {1: 1e-3, 8: 1.2e-3, 50: 2e-3}})
    return file


def uses(clone: Path) -> list[list[Any]]:
    """Return revision and problems of every use that is noted."""
    return [[use["revision"], use["problems"]] for use in json.loads((clone / results.USES).read_text())]


@pytest.fixture
def small(tiny: dict[str, Any], tiny_draft: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Encoded]]:
    """Make the benchmark small, of the tiny models; return a list that every prompt that is given to a model is added to,
    with its split."""
    env = {name: tiny[name] for name in ("target", "device", "dtype")}
    env |= {"drafter": f"lookup+{tiny_draft}", "k_max": 6, "prompts": "mt_bench,gsm8k", "decision": "token"}
    seen: list[tuple[str, Encoded]] = []

    def noted(env: dict[str, Any], split: str, count: int) -> list[Encoded]:
        found = encoded_prompts(env, split, count)
        seen.extend((split, prompt) for prompt in found)
        return found

    monkeypatch.setattr(tables, "encoded_prompts", noted)
    monkeypatch.setitem(command.PROBLEMS, "SpecK-v0", env)
    monkeypatch.setattr(command, "FULL", TINY)
    monkeypatch.setitem(arms.GRIDS, "SpecK-v0", {"svip": {"threshold": (0.8, 1.2)}})
    monkeypatch.setattr(replay, "FOREIGN", ("qwen3-14b-a6000",))
    monkeypatch.setattr(replay, "FEW", (1,))
    monkeypatch.setattr(record, "costs_of", lambda *_: {p: {str(n): s for n, s in c.items()} for p, c in COSTS.items()})
    monkeypatch.setattr(command, "prices_of", priced)
    monkeypatch.setattr(statistics, "RESAMPLES", 50)
    for name in arms.ARMS:
        monkeypatch.setitem(arms.ARMS, name, arms.TrainedArm(name, hyperparameters={"steps": 20}))
    return seen


def test_final_texts_are_measured_and_counted_once(
    clone: Path,
    run: Callable[..., None],
    small: list[tuple[str, Encoded]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored: list[tuple[str, tuple[int, ...]]] = []
    measure = arms.samples_of

    def noted(problem: Any, policy: Any, split: str, texts: Any = None, foreign: Any = None) -> Any:
        samples = measure(problem, policy, split, texts, foreign)
        scored.extend((split, tuple(sample.prompt.ids)) for sample in samples)
        return samples

    for module in (arms, replay, command):
        monkeypatch.setattr(module, "samples_of", noted)
    run("--envs", "SpecK-v0")

    [folder] = (tmp_path / "runs" / "results" / REVISION / "traces").iterdir()
    trace, split_of = Trace.load(folder), {}
    for text in trace.texts:
        split_of[tuple(text.prompt)] = text.split
    assert set(split_of.values()) == {"train", "validation", "final"}
    assert {split for split, _ in scored} == {"train", "validation", "final"}
    assert all(split_of[prompt] == split for split, prompt in scored)
    assert {split for split, _ in small} == {"final"}

    assert uses(clone) == [["fedcba9", ["SpecK-v0"]], [REVISION, ["SpecK-v0"]]]
    found = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert set(found) == {"SpecK-v0"}
    one = found["SpecK-v0"]
    assert set(one) == {"static", "arms", "clairvoyant", "revision", "processor", "final_uses"}
    assert (one["revision"], one["final_uses"]) == (REVISION, 2) and one["clairvoyant"] >= 1
    assert set(one["static"]) == {"setting", "over_plain"}
    assert {"hindsight", "exact-pg", "ppo", "svip"} <= set(one["arms"])
    assert not {"plain", "static", "plain again", "static again"} & set(one["arms"])
    for arm in one["arms"].values():
        assert set(arm["priced"]) == {"over_static", "low", "high", "over_plain"}
        assert set(arm["live"]) == {*arm["priced"], "void", "reason"}
        assert arm["priced"]["low"] <= arm["priced"]["over_static"] <= arm["priced"]["high"]

    page, summary = (clone / place for place in ("docs/results/adaptive-control.md", "RESULTS.md"))
    assert "of the split `final`" in page.read_text() and "this is use 2 of it" in page.read_text()
    assert "](docs/results/adaptive-control.md)" in summary.read_text()
    assert f"Revision {REVISION}; {one['processor']}" in summary.read_text()

    def measured_again(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(command, "measure", measured_again)
    before = summary.read_text()
    summary.unlink()
    run("--envs", "SpecK-v0")
    assert len(uses(clone)) == 2 and summary.read_text() == before
    summary.unlink()
    run("--from-json", str(page.with_suffix(".json")))
    assert len(uses(clone)) == 2 and summary.read_text() == before


def test_use_is_counted_before_anything_is_measured(
    clone: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed has looked at final texts; the same command continues it."""
    seen = []

    def killed(*_: Any) -> None:
        seen.append(uses(clone))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", killed)
    one, two = ["SpecK-v0"], ["SpecK-v0", "SpecDepth-v0"]
    for problems in (one, one, two, two[::-1]):
        with pytest.raises(SystemExit):
            run("--envs", *problems)
    first, other = [["fedcba9", one], [REVISION, one]], [REVISION, two]
    assert seen == [first, first, [*first, other], [*first, other]]


@pytest.mark.parametrize("measuring", ["unknown", "0123abc-dirty"])
def test_uncommitted_code_is_refused(
    clone: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, measuring: str
) -> None:
    monkeypatch.setattr(results, "revision", lambda: measuring)
    with pytest.raises(
        SystemExit, match=f"one committed revision, and this one is {measuring}; commit .* or give --fast"
    ):
        run("--envs", "SpecK-v0")
    assert len(uses(clone)) == 1


def test_small_version_leaves_the_final_split_alone(
    clone: Path, run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = []

    def measure(name: str, size: Size, root: Path) -> Any:
        held_out.append((size.held_out, size.ltd_seeds))
        return replace(findings(name), settings=size)

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(results, "revision", lambda: "unknown")
    run("--fast", "--envs", "SpecDepth-v0", "--out", str(tmp_path / "out"), "--ltd-seeds", "0")
    assert held_out == [("test", 0)] and len(uses(clone)) == 1
    assert json.loads((tmp_path / "runs" / "results-fast.json").read_text())["SpecDepth-v0"]["final_uses"] is None
    for name in ("RESULTS-fast.md", "adaptive-control-fast.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "of the split `test`" in text and "Learning to Draft was left out" in text
    assert not (clone / "RESULTS.md").exists() and not list((clone / results.OUT).glob("adaptive*"))


def test_figures_of_the_test_split_do_not_become_published_results(
    clone: Path, run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "adaptive-control.json"
    monkeypatch.setattr(sys, "argv", ["spec-envs bench adaptive"])
    report.PAGE.write(Benchmark(problems={"SpecK-v0": findings("SpecK-v0")}, fast=False), path)
    with pytest.raises(SystemExit, match="is not of the split final; expected a file that spec-envs results wrote"):
        run("--from-json", str(path))
    assert not (clone / "RESULTS.md").exists()


def test_arms_are_named_whose_live_and_priced_intervals_are_apart() -> None:
    """Void timings say nothing, so that they contradict nothing."""
    problem = findings("SpecK-v0")
    live, priced = problem.live, problem.live.at_prices
    assert live.quiet and priced and report.disagreements(live) == []
    priced.arms["ppo"].over["static"] = Interval(2.0, 1.9, 2.1)
    shown = Benchmark(problems={"SpecK-v0": problem}, fast=False, final_uses=3)
    for lines in (report.body(shown), results.summary_of(shown, "page.md")):
        [line] = [line for line in lines if "do not overlap" in line]
        assert "interval of `ppo` over S*" in line and "2.000 [1.900, 2.100]" in line
    live.arms["plain again"].over["plain"] = Interval(1.2, 1.1, 1.3)
    assert "`hindsight` cannot be judged, because the timings are void" in "\n".join(report.body(shown))
    text = "\n".join(results.summary_of(shown, "page.md"))
    assert "do not overlap" not in text and "| `ppo` | 2.000 [1.900, 2.100] | void |" in text


def test_trace_of_final_texts_is_another_one_and_is_not_drawn_from(plans: dict[str, Plan], tmp_path: Path) -> None:
    plan = plans["chain"]
    final = replace(plan, held_out="final")
    assert default_folder(final, tmp_path).name == f"{default_folder(plan, tmp_path).name}-final"
    trace = recorded_at_costs(final, tmp_path / "trace")
    assert isinstance(trace, Trace) and trace.of_split("final")
    assert trace.of_split("all") == [*trace.of_split("train"), *trace.of_split("validation")]
    with pytest.raises(ValueError, match="no texts"):
        trace.of_split("test")
    with pytest.raises(ValueError, match="begun with another held_out"):
        plan.claim(trace.folder)
