"""Bounds on the texts of a trace: static settings cost what the environment charges, and no sequence of settings is
faster than the clairvoyant optimum."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs.agents.baselines.copy_k import CopyKAgent
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.controls import Control, make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.measure.bounds import Bounds
from spec_envs.experiments.measure.static import best_by_copies

TABLE = CostTable("made up", {1: 1.0, 4: 1.1, 40: 1.3}, {1: 0.02, 2: 0.03, 8: 0.06})
WHOLE: list[tuple[str, str, dict[str, Any], list[int | str]]] = [
    ("SpecDepth-v0", "tree", {"max_depth": 4, "width": 4, "budget": 12}, [1, 2, 4]),
    ("SpecBudget-v0", "tree", {"max_depth": 4, "width": 4, "budgets": (0, 3, 30), "depth": 2}, [0, 3, 30]),
    ("SpecTree-v0", "tree", {"max_depth": 4, "width": 4, "budgets": (0, 2, 9)}, ["0x0", "0x9", "1x2", "4x9"]),
    ("SpecK-v0", "chain", {"k_max": 6}, [0, 1, 6]),
    ("SpecK-v0", "copies", {"k_max": 6}, [0, 2, 3, 6]),
    ("SpecK-v0", "copies", {"k_max": 6, "decision": "token"}, [2, 6]),
    ("SpecK-v0", "lookup", {"k_max": 6}, [1, 6]),
]
SHORT: list[tuple[str, str, dict[str, Any], list[int | str]]] = [
    ("SpecDepth-v0", "tree", {"max_depth": 3, "width": 4, "budget": 12}, [1, 2, 3]),
    ("SpecBudget-v0", "tree", {"max_depth": 4, "width": 4, "budgets": (0, 3, 30), "depth": 2}, [0, 3, 30]),
    ("SpecTree-v0", "tree", {"max_depth": 1, "width": 4, "budgets": (0, 6)}, ["0x0", "0x6", "1x0", "1x6"]),
    ("SpecK-v0", "chain", {"k_max": 2}, [0, 1, 2]),
    ("SpecK-v0", "copies", {"k_max": 3}, [0, 1, 2, 3]),
    ("SpecK-v0", "lookup", {"k_max": 2}, [0, 1, 2]),
]


def settings(bounds: Bounds) -> list[int | str]:
    """Return the setting of each plan in the form that ``FixedAgent`` expects."""
    by_name = {"depth": lambda d, b: d, "budget": lambda d, b: b, "tree": lambda d, b: f"{d}x{b}", "k": lambda k: k}
    return [by_name[bounds.control.name](*name) for name in bounds.plans.names]


def drafting(name: str) -> Control:
    """Return the control of the trees or chains in a trace."""
    trees = "tree" in name
    return make_control("tree", {"max_depth": 4, "width": 4}) if trees else make_control("k", {"k_max": 6})


class TextReplay:
    """Replay texts of a trace in one environment, with a separate setting for each cycle."""

    def __init__(self, env_id: str, trace: Trace, folder: Path, max_new_tokens: int, keywords: dict[str, Any]):
        costs = folder / "costs.json"
        costs.write_text(json.dumps({"verify": TABLE.verify, "draft": TABLE.draft}))
        shared = {"trace": str(trace.folder), "split": "all", "clock": str(costs), "max_new_tokens": max_new_tokens}
        self.env: Any = gym.make(env_id, **shared, **keywords).unwrapped
        self.control = make_control(env_id, keywords)
        self.bounds = Bounds(trace, self.control, TABLE, range(len(trace.texts)), max_new_tokens)

    def seconds(self, text: int, sequence: list[int | str], repeat: bool = False) -> tuple[float, bool]:
        """Follow one setting per cycle (``repeat``: the first in every cycle); return the seconds, and True if the
        text has ended."""
        agents = [FixedAgent(self.control, value=value) for value in sequence]
        return self.under(itertools.repeat(agents[0]) if repeat else agents, text)

    def under(self, agents: Iterable[Any], text: int) -> tuple[float, bool]:
        """Follow one agent per cycle; return the seconds, and True if the text has ended."""
        observation, _ = self.env.reset(options={"prompt": self.env.prompts[text]})
        spent = 0.0
        for agent in agents:
            if self.env.decoder.finished:
                break
            emitted = 0
            while not emitted:
                observation, _, _, _, info = self.env.step(agent.predict(observation)[0])
                spent, emitted = spent + sum(info["seconds"].values()), info["emitted"]
        return spent, self.env.decoder.finished

    def least(self, text: int, offered: list[int | str], sequence: list[int | str]) -> float:
        """Return the least seconds over all continuations of a sequence of settings."""
        spent, ended = self.seconds(text, sequence)
        return spent if ended else min(self.least(text, offered, [*sequence, value]) for value in offered)


@pytest.mark.parametrize(("env_id", "name", "keywords", "chosen"), WHOLE)
def test_static_seconds_equal_those_of_environment(
    env_id: str,
    name: str,
    keywords: dict[str, Any],
    chosen: list[int | str],
    traces: dict[str, Trace],
    tmp_path: Path,
) -> None:
    replay = TextReplay(env_id, traces[name], tmp_path, 20, keywords)
    bounds, texts = replay.bounds, range(len(traces[name].texts))
    static, offered = bounds.static(), settings(bounds)
    for value in chosen:
        replayed = [replay.seconds(text, [value], repeat=True)[0] for text in texts]
        np.testing.assert_allclose(static[:, offered.index(value)], replayed, rtol=1e-9)
    assert (bounds.tokens == [min(text.tokens, 20) - 1 for text in traces[name].texts]).all()
    finite = np.isfinite(static).all(0)
    assert finite.tolist() == [env_id != "SpecDepth-v0" or value != 0 for value in offered]


@pytest.mark.parametrize(("env_id", "name", "keywords", "offered"), SHORT)
def test_clairvoyant_seconds_are_least_of_all_sequences(
    env_id: str,
    name: str,
    keywords: dict[str, Any],
    offered: list[int | str],
    traces: dict[str, Trace],
    tmp_path: Path,
) -> None:
    replay = TextReplay(env_id, traces[name], tmp_path, 6, keywords)
    bounds = replay.bounds
    static, best = bounds.static(), bounds.clairvoyant()
    assert [value for value, finite in zip(settings(bounds), np.isfinite(static[0]), strict=True) if finite] == offered
    for text in (1, 5):
        assert best[text] == pytest.approx(replay.least(text, offered, []))
    assert (best <= static.min(1) + 1e-9).all()


def test_no_static_setting_beats_clairvoyant(traces: dict[str, Trace]) -> None:
    for env_id, name, keywords, _ in WHOLE:
        control = make_control(env_id, keywords)
        bounds = Bounds(traces[name], control, TABLE, range(7), 24)
        static, best = bounds.static(), bounds.clairvoyant()
        assert (best <= static.min(1) + 1e-9).all(), env_id
        assert best.sum() < static.sum(0).min() or name == "lookup", env_id  # the best setting differs between cycles
        assert bounds.throughput(best) >= bounds.throughput(static).max()


def test_best_setting_overall_and_by_task(traces: dict[str, Trace]) -> None:
    trace = traces["tree"]
    control = make_control("depth", {"max_depth": 4, "width": 4, "budget": 5})
    bounds = Bounds(trace, control, TABLE, [0, 1, 5], 20)
    assert bounds.tasks == [trace.texts[i].task for i in (0, 1, 5)] and bounds.tasks[0] == bounds.tasks[2]
    seconds = np.array([[np.inf, 5.0, 1.0, 3.0, 9.0], [np.inf, 1.0, 9.0, 2.0, 9.0], [np.inf, 1.0, 6.0, 2.0, 9.0]])
    assert bounds.best(seconds) == 1  # sums 7, 16 and 7: the first of equal ones
    seconds[1, 1] = 1.5
    assert bounds.best(seconds) == 3
    assert bounds.best_by_task(seconds) == {bounds.tasks[0]: 3, bounds.tasks[1]: 1}
    assert list(bounds.best_by_task(seconds)) == bounds.tasks[:2]  # in the order of the texts
    np.testing.assert_allclose(bounds.throughput(seconds)[1:], bounds.tokens.sum() / seconds.sum(0)[1:])
    static = bounds.static()
    alone = Bounds(trace, control, TABLE, [1], 20)
    np.testing.assert_allclose(alone.static()[0], static[1])
    assert bounds.best_by_task(static)[bounds.tasks[1]] == alone.best(alone.static())


@pytest.mark.parametrize(("name", "decision"), [("copies", "token"), ("copies", "cycle"), ("suffix copies", "token")])
def test_two_lengths_are_exact_and_the_best_of_all(
    name: str, decision: str, traces: dict[str, Trace], tmp_path: Path
) -> None:
    """Brute force: every two lengths are followed in the environment by the agent ``copy-k``."""
    replay = TextReplay("SpecK-v0", traces[name], tmp_path, 20, {"k_max": 3, "decision": decision})
    bounds, texts = replay.bounds, range(len(traces[name].texts))
    assert 0 < bounds.begins_with_copy.mean() < 1
    found, pairs = bounds.by_copies(), list(itertools.product(range(4), repeat=2))
    played = {pair: CopyKAgent(replay.control, k=pair[0], k_copied=pair[1]) for pair in pairs}
    replayed = {pair: [replay.under(itertools.repeat(agent), i)[0] for i in texts] for pair, agent in played.items()}
    for pair, seconds in replayed.items():
        np.testing.assert_allclose(found[:, pair[0], pair[1]], seconds, rtol=1e-9)
    fastest = best_by_copies(bounds)
    assert fastest and sum(replayed[fastest[0], fastest[1]]) == pytest.approx(min(map(sum, replayed.values())))
    np.testing.assert_allclose(np.diagonal(found, axis1=1, axis2=2), bounds.static())
    assert len(np.unique(found.sum(0).round(9))) > 4  # each length of the two matters


@pytest.mark.parametrize(
    ("env_id", "name", "keywords"),
    [
        ("SpecK-v0", "chain", {"k_max": 3}),
        ("SpecK-v0", "lookup", {"k_max": 3}),
        ("SpecDepth-v0", "copied tree", {"max_depth": 3, "width": 4}),
    ],
)
def test_two_lengths_are_of_chains_that_may_begin_with_copies(
    env_id: str, name: str, keywords: dict[str, Any], traces: dict[str, Trace]
) -> None:
    assert best_by_copies(Bounds(traces[name], make_control(env_id, keywords), TABLE, [0, 1], 20)) is None


@pytest.mark.parametrize("name", ["copies", "chain", "tree", "copied tree"])
def test_lookup_alone_costs_what_its_own_recording_does(name: str, traces: dict[str, Trace]) -> None:
    """The texts are the same in every trace; what ``lookup`` drafts at each token was recorded in one of them."""
    texts, control = range(len(traces[name].texts)), drafting(name)
    bounds = Bounds(traces[name], control, TABLE, texts, 20)
    recorded = Bounds(traces["lookup"], drafting("lookup"), TABLE, texts, 20)
    assert (np.asarray(traces[name].columns["tokens"]) == traces["lookup"].columns["tokens"]).all()
    found = bounds.by_lookup()
    np.testing.assert_allclose(found, recorded.static()[:, : control.max_depth + 2], rtol=1e-9)
    assert len(np.unique(found.sum(0).round(9))) > 3  # longer chains are other chains


def test_copies_before_a_model_are_others_than_those_of_lookup_alone(traces: dict[str, Trace]) -> None:
    """Such copies need two matching tokens; after one, lookup alone copies where the model drafts."""
    own, before = traces["lookup"].columns["copied"], traces["copies"].columns["copied"]
    assert (before[:, 0] <= own[:, 0]).all() and before[:, 0].sum() < own[:, 0].sum()


@pytest.mark.parametrize("name", ["copies", "copied tree"])
def test_lookup_alone_is_what_decoding_with_it_costs(name: str, traces: dict[str, Trace], tiny: dict[str, Any]) -> None:
    trace, control, texts = traces[name], drafting(name), [1, 5]
    one = CostTable("one", {1: 1.0, 40: 1.0}, {1: 0.5})  # seconds are cycles
    seconds, cycles = (Bounds(trace, control, table, texts, 20).by_lookup() for table in (TABLE, one))
    decoder = load_decoder(tiny["target"], "lookup", "cpu", "float32", clock=PricedClock(TABLE), width=1, max_depth=4)
    for (i, text), k in itertools.product(enumerate(texts), (0, 1, 4)):
        decoder.start(trace.texts[text].prompt, 20, np.random.default_rng(0))
        while not decoder.finished:
            decoder.cycle(k)
        assert len(decoder.cycles) == cycles[i, k]
        assert sum(decoder.clock.totals.values()) - decoder.clock.totals["prefill"] == pytest.approx(seconds[i, k])
