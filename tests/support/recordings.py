"""Traces of the tiny models, and vector environments that replay them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import pytest

from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.decoding.traces.trace import Trace
from spec_envs.vector.env import ReplayVectorEnv
from tests.support.traced import CASES, costs_in

if TYPE_CHECKING:
    from spec_envs.experiments.traces.plan import Plan

PROMPTS = "mt_bench,gsm8k,cnndm,xsum,humaneval"
TEXTS = (4, 1, 2)  # train, validation and test texts in the traces
# Seconds of forwards in the first trace; those of others are multiples. Measuring them takes longer than recording does.
COSTS = {"verify": {1: 1e-3, 50: 2e-3}, "draft": {1: 2e-4, 50: 4e-4}}


@pytest.fixture(scope="session")
def plans(tiny: dict[str, Any], tiny_draft: Path, tiny_parallel: Path) -> dict[str, Plan]:
    """Return recordings of the tiny models: trees of a head, alone and with copies before it, and of suffix decoding;
    chains of a draft model with a shortlist, and of a whole one with copies before it; chains of copies alone."""
    # imported here, since most tests need nothing of the experiments
    from spec_envs.experiments.traces.plan import Plan

    env = {name: tiny[name] for name in ("target", "device", "dtype", "max_new_tokens")} | {"prompts": PROMPTS}
    trees = {"max_depth": 4, "width": 4}
    return {
        "tree": Plan("SpecDepth-v0", env | {"drafter": tiny["drafter"], **trees}, TEXTS),
        "blocks": Plan("SpecDepth-v0", env | {"drafter": str(tiny_parallel), "max_depth": 6, "width": 3}, TEXTS),
        "copied tree": Plan("SpecDepth-v0", env | {"drafter": f"lookup+{tiny['drafter']}", **trees}, TEXTS),
        "suffix tree": Plan("SpecDepth-v0", env | {"drafter": "suffix", **trees}, TEXTS),
        "chain": Plan("SpecK-v0", env | {"drafter": f"{tiny_draft}@9", "k_max": 6}, TEXTS),
        "copies": Plan("SpecK-v0", env | {"drafter": f"lookup+{tiny_draft}", "k_max": 6}, TEXTS),
        "suffix copies": Plan("SpecK-v0", env | {"drafter": f"suffix+{tiny_draft}", "k_max": 6}, TEXTS),
        "lookup": Plan("SpecK-v0", env | {"drafter": "lookup", "k_max": 6}, TEXTS),
        "suffix": Plan("SpecK-v0", env | {"drafter": "suffix", "k_max": 6}, TEXTS),
    }


class Recordings(dict[str, Trace]):
    """Traces by the name of their plan, each of which is recorded once it is asked for.

    Args:
        plans: the plans by name.
        folder: returns a new folder with a name.
    """

    def __init__(self, plans: dict[str, Plan], folder: Callable[[str], Path]):
        super().__init__()
        self.plans, self.folder = plans, folder

    def __missing__(self, name: str) -> Trace:
        found = recorded_at_costs(self.plans[name], self.folder(name))
        assert isinstance(found, Trace)
        self[name] = found
        return found


def recorded_at_costs(plan: Plan, folder: Path) -> Trace | PortfolioTrace:
    """Return the trace of a plan, or the traces of its drafters, recorded in a folder with ``COSTS``."""
    from spec_envs.experiments.traces import record

    numbers = itertools.count(1)

    def costs(*_: object) -> dict[str, dict[str, float]]:
        number = next(numbers)
        return {part: {str(n): number * seconds for n, seconds in curve.items()} for part, curve in COSTS.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "costs_of", costs)
        return record.all_recorded(plan, folder)


@pytest.fixture(scope="session")
def traces(plans: dict[str, Plan], tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    """Return the recorded trace of each plan."""
    return Recordings(plans, tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def portfolio_plan(tiny: dict[str, Any], tiny_draft: Path) -> Plan:
    """Return a recording of drafters of the tiny target: copiers, a head and draft models, alone and with copies
    first."""
    from spec_envs.experiments.traces.plan import Plan

    env = {name: tiny[name] for name in ("target", "device", "dtype", "max_new_tokens")}
    several = f"lookup,{tiny['drafter']},{tiny_draft}@9,lookup+{tiny_draft},suffix,lookup+{tiny['drafter']}"
    sizes = {"sizes": (1, 2, 5), "depths": (0, 1, 2), "width": 3}
    return Plan("SpecDrafter-v0", env | sizes | {"drafter": several}, TEXTS)


@pytest.fixture(scope="session")
def portfolio(portfolio_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> PortfolioTrace:
    """Return the recorded traces of several drafters."""
    found = recorded_at_costs(portfolio_plan, tmp_path_factory.mktemp("portfolio"))
    assert isinstance(found, PortfolioTrace)
    return found


def costs_of(trace: PortfolioTrace, folder: Path) -> str:
    """Write a cost table with a curve for every drafter that makes forwards; return its path."""
    curve, path = {1: 0.01, 8: 0.03}, folder / "costs.json"
    drafters = {name: {n: s * i for n, s in curve.items()} for i, name in enumerate(trace.traces, start=1)}
    path.write_text(json.dumps({"verify": {1: 0.1, 9: 0.2}, "draft": curve, "drafters": drafters}))
    return str(path)


@pytest.fixture(scope="session")
def vectors(traces: dict[str, Trace], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ReplayVectorEnv]:
    """Return a vector environment of each case on the training texts; copy one before stepping it."""
    clock, made = costs_in(tmp_path_factory.mktemp("costs")), {}
    for case, (env_id, name, keywords) in CASES.items():
        shared = {"trace": str(traces[name].folder), "clock": clock, "max_new_tokens": 20, **keywords}
        made[case] = gym.make_vec(env_id, num_envs=8, vectorization_mode="vector_entry_point", **shared)
    return made


def sizes(plan: Plan) -> dict[str, Any]:
    """Return the keyword arguments of a plan that give the sizes of its drafts."""
    return {key: plan.env[key] for key in ("max_depth", "width", "k_max") if key in plan.env}
