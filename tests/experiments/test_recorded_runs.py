"""Runs that learn from a trace which is recorded for them: prices, static settings, and the table."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spec_envs.controls import make_control
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments import train
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.evaluate import evaluate_run
from spec_envs.experiments.measure.bounds import Bounds
from spec_envs.experiments.measure.machine import this_machine
from spec_envs.experiments.measure.results import COPIES, LOOKUP, PAIR, Best
from spec_envs.experiments.measure.static import best_recorded, weighable
from spec_envs.experiments.reports.screen import screen
from spec_envs.sealed import read_sealed, write_sealed
from tests.support.recordings import COSTS
from tests.support.runs import SMALL as FEW_LESSONS

SMALL = [
    "record=[4,1,1]", "test_prompts=2", "total_timesteps=256", "hyperparameters.num_envs=4", "hyperparameters.n_steps=16",
    "hyperparameters.batch_size=32", "env.max_new_tokens=16", "env.max_depth=3", "env.width=3", "env.budget=2",
]  # fmt: skip
AS_TEXT = {part: {str(n): seconds for n, seconds in curve.items()} for part, curve in COSTS.items()}


@pytest.fixture(scope="module")
def root(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of runs with one of the default stanza of SpecDepth-v0, at a budget of 2."""
    env = [f"env.{key}={value}" for key, value in tiny.items() if key != "clock"]
    experiment = load_experiment("SpecDepth-v0", "ppo", [*env, *SMALL])
    found = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spec_envs.experiments.traces.record.costs_of", lambda *_: AS_TEXT)
        train.run(experiment, "SpecDepth-v0", "ppo", 0, found / "SpecDepth-v0" / "ppo-0")
    return found


def trace_in(root: Path) -> Trace:
    return Trace.load(next((root / "traces").glob("*-tree")))


def test_all_of_a_run_has_the_prices_of_its_trace(root: Path) -> None:
    run = root / "SpecDepth-v0" / "ppo-0"
    results, table = json.loads((run / "results.json").read_text()), CostTable.load(str(run / "clock.json"))
    assert table.curves == trace_in(root).costs().curves
    assert {int(n): s for n, s in results["at_prices"]["costs"]["verify"].items()} == table.verify
    assert "the run began" in results["at_prices"]["source"]
    for table_of, rows in (("live", results["arms"]), ("priced", results["at_prices"]["arms"])):
        said = results[table_of]["ppo"]
        assert [said[key] for key in ("over_static", "low", "high")] == list(rows["ppo"]["over_static"].values())
        assert said["over_plain"] == rows["ppo"]["over_plain"]["value"] and isinstance(said["void"], bool)
    assert not results["priced"]["ppo"]["void"]


def test_static_settings_are_the_best_of_all_on_the_training_texts(root: Path) -> None:
    """At a budget of 2 the environment offers three depths, the pair all depths and budgets and prompt lookup alone,
    which the tiny texts, full of repetitions, make the fastest."""
    trace, chosen = trace_in(root), read_sealed(root / "SpecDepth-v0" / "ppo-0" / "static.json", "")
    control = make_control("SpecDepth-v0", {"max_depth": 3, "width": 3, "budget": 2})
    bounds = Bounds(trace, control, trace.costs(), trace.of_split("train"), 16)
    assert tuple(chosen["best"]) == bounds.plans.names[int(np.argmax(bounds.throughput(bounds.static())))]
    assert chosen["best"][1] == 2 and len(chosen["tokens_per_second"]) == 3
    assert chosen["pair"] == [f"lookup:{bounds.best(bounds.by_lookup())}"]


@pytest.mark.parametrize("pair", ["lookup alone", "another tree", "the same tree"])
def test_arms_of_static_settings_are_left_out_where_they_are_the_same(pair: str, root: Path, tmp_path: Path) -> None:
    run, own = root / "SpecDepth-v0" / "ppo-0", tmp_path / "ppo-0"
    shutil.copytree(run, own)
    chosen = read_sealed(own / "static.json", "")
    chosen |= {"pair": {"another tree": [0, 3], "the same tree": chosen["best"]}.get(pair, chosen["pair"])}
    write_sealed(own / "static.json", chosen)
    results = evaluate_run(own, {}, 2)
    arms = results.arms
    assert (PAIR in arms) == (pair != "the same tree") and (LOOKUP in arms) == (pair != "lookup alone")
    for name in {PAIR, LOOKUP} & set(arms):
        assert name in results.references and name in arms["ppo"].over
        priced = results.at_prices.arms[name] if results.at_prices else None
        assert priced and (priced.parts["draft"] == 0) == (name == LOOKUP or pair == "lookup alone")
    said = " ".join(screen(results, own, "", own).split())
    assert ("lookup alone, whatever the agent may decide, which is lookup (k 1)" in said) == (pair == "lookup alone")
    assert ("prompt lookup alone, without the model (k 1)" in said) == (pair != "lookup alone")


def test_both_static_settings_may_be_the_same(root: Path) -> None:
    trace = trace_in(root)
    control = make_control("SpecTree-v0", {"max_depth": 3, "width": 3})
    free = CostTable("free drafts", trace.costs().verify, {1: 1e-9})
    best = best_recorded(trace, control, free, 16)
    assert best.best == best.pair and len(best.tokens_per_second) == 4 * len(control.budgets)
    assert not weighable(make_control("SpecBudget-v0", {"depth": "random"}))
    assert not weighable(make_control("SpecK-v0", {"adjustment_interval": 64}))


@pytest.mark.parametrize("moved", [False, True])
def test_a_trace_of_another_machine_is_priced_anew(
    moved: bool, root: Path, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trace_in(root).folder, tmp_path / "trace")
    trace, env = Trace.load(tmp_path / "trace"), {**tiny, "clock": "wall"}
    here = this_machine(train.resolve_device("cpu"), trace.manifest.dtype)
    trace.manifest.made_with = asdict(replace(here, processor="another") if moved else here)
    here_costs = {part: {n: 2 * s for n, s in curve.items()} for part, curve in AS_TEXT.items()}

    def calibrated(table: Path, *_: Any) -> Path:
        if not table.exists():
            write_sealed(table, here_costs)
        return table

    monkeypatch.setattr(train, "calibrated", calibrated)
    table = train.price_of(trace, tmp_path / "clock.json", env, make_control("SpecDepth-v0", env))
    assert CostTable.load(str(table)).verify[1] == trace.costs().verify[1] * (2 if moved else 1)


@pytest.mark.parametrize("copies", [True, False])
def test_table_has_the_two_lengths_where_chains_may_begin_with_copies(
    copies: bool, tiny: dict[str, Any], tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_lengths(*given: Any) -> Best:
        found = best_recorded(*given)
        return replace(found, best=[2], copied=found.copied and [1, 4])  # lengths that no other arm has

    monkeypatch.setattr("spec_envs.experiments.traces.record.costs_of", lambda *_: AS_TEXT)
    monkeypatch.setattr("spec_envs.experiments.evaluate.best_recorded", other_lengths)
    env = {name: value for name, value in tiny.items() if name != "clock"}
    env |= {"drafter": f"lookup+{tiny_draft}" if copies else f"{tiny_draft}@9", "max_new_tokens": 16, "k_max": 4}
    changes = ["record=[4,1,1]", "test_prompts=2", *(f"env.{name}={value}" for name, value in env.items())]
    changes += [f"hyperparameters.{name}={value}" for name, value in FEW_LESSONS.items()]
    run = tmp_path / "SpecK-v0" / "hindsight-0"
    train.run(load_experiment("SpecK-v0", "hindsight", changes), "SpecK-v0", "hindsight", 0, run)
    arms, notes = json.loads((run / "results.json").read_text())["arms"], (run / "results.md").read_text()
    assert (COPIES in arms) == copies and ("over_" + COPIES in arms["hindsight"]) == copies
    assert ("k 1, and k 4 where the first token is a copy" in notes) == copies
