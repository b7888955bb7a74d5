"""Prompt lookup alone as a static setting of a pair: its choice, and its arm of a table."""

from __future__ import annotations

from typing import Any

import pytest

from spec_envs.controls import Control, make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.traces.replay import replayed
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.measure.arms import Encoded, decoded, run_arms
from spec_envs.experiments.measure.bounds import Bounds
from spec_envs.experiments.measure.lookup import LookupControl
from spec_envs.experiments.measure.results import looked_up
from spec_envs.experiments.measure.static import (
    best_lookup,
    best_of_pair,
    best_recorded,
    pair_control,
    pair_policy,
    seconds_of_pair,
)
from tests.support.recordings import COSTS

DEAR = CostTable("dear drafts", COSTS["verify"], {1: 1.0, 50: 2.0})
FREE = CostTable("free drafts", COSTS["verify"], {1: 1e-9, 50: 1e-9})
FLAT = CostTable("free verification", {1: 1e-3, 50: 1e-3}, {1: 1.0, 50: 2.0})
PROBLEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "copies": ("SpecK-v0", {"k_max": 6}),
    "tree": ("SpecTree-v0", {"max_depth": 4, "width": 4}),
    "copied tree": ("SpecDepth-v0", {"max_depth": 4, "width": 4, "budget": 2}),
}


def pair_of(name: str) -> Control:
    return pair_control(make_control(*PROBLEMS[name]))


@pytest.mark.parametrize("name", list(PROBLEMS))
@pytest.mark.parametrize("table", [DEAR, FREE, FLAT], ids=lambda table: table.name)
def test_best_of_a_pair_is_the_fastest_with_any_drafter(name: str, table: CostTable, traces: dict[str, Trace]) -> None:
    trace = traces[name]
    train, test = (Bounds(trace, pair_of(name), table, trace.of_split(split), 20) for split in ("train", "test"))
    found, drafted, copied = best_of_pair(train), train.static().sum(0).min(), train.by_lookup().sum(0)
    assert seconds_of_pair(train, found).sum() == min(drafted, copied.min())
    assert (looked_up(found) is None) == (drafted <= copied.min())
    if table is FLAT:
        assert found == [f"lookup:{copied.argmin()}"] and copied.argmin() > 0
    lookup = best_lookup(train)
    assert lookup and copied[lookup[0]] == copied.min()
    best = best_recorded(trace, make_control(*PROBLEMS[name]), table, 20)
    assert (best.pair, best.lookup, best.looks_up) == (found, lookup, looked_up(found) is not None)
    policy = pair_policy(pair_of(name), found)
    assert isinstance(policy.control, LookupControl) == best.looks_up
    decoder = replayed(trace, PricedClock(table), pair_of(name).max_depth)
    prompts = [Encoded(trace.texts[i].task, trace.texts[i].prompt) for i in trace.of_split("test")]
    samples = run_arms({"": decoded(policy.control.separate(decoder), policy)}, prompts, 20, "", quiet=True)[""]
    assert [sample.seconds for sample in samples] == pytest.approx(seconds_of_pair(test, found).tolist())


def test_lookup_is_no_other_drafter_than_itself(traces: dict[str, Trace]) -> None:
    control = make_control("k", {"k_max": 6})
    best = best_recorded(traces["lookup"], control, FLAT, 20)
    assert best.lookup is None and not best.looks_up and best.pair == best.best
