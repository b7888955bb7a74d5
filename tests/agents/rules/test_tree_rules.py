"""The published tree rules follow their papers, decode faster than plain, and can be tuned."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

from spec_envs import agents
from spec_envs.agents import AGENTS
from spec_envs.agents.rules.tree_base import TreeRule
from spec_envs.controls import Control, make_control
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.controls.tree import EXPAND, TreeControl
from spec_envs.decoding.clock import CostTable
from spec_envs.experiments import tune
from spec_envs.experiments.config import load_experiment
from tests.support.observations import observation_of
from tests.support.rollouts import generation_under

STANZAS = [
    ("SpecDepth-v0", "ddd"),
    ("SpecBudget-v0", "expected-gain"),
    ("SpecBudget-v0", "ucb"),
    *(("SpecTree-v0", stanza) for stanza in ("ddd", "svip", "expected-gain")),
]


def table(verify: float = 0.0, draft: float = 0.1) -> CostTable:
    """Return a cost table: a plain step takes 1 s, each further row ``verify`` s, each drafter forward ``draft`` s."""
    return CostTable("made up", {1: 1.0, 101: 1.0 + 100 * verify}, {1: draft})


def test_ddd_expands_while_beam_is_probable() -> None:
    depth, tree = DepthControl(), TreeControl()
    for control, expands, stops in ((depth, 1, 0), (tree, EXPAND, 1 + tree.budgets.index(11))):
        agent = AGENTS["ddd"](control=control, threshold=0.5, budget=11)
        assert agent.predict(observation_of(control, frontier=[0.3, 0.21]))[0] == expands
        assert agent.predict(observation_of(control, frontier=[0.3, 0.19]))[0] == stops
        assert (
            agent.predict(observation_of(control, frontier=[0.9], expansions=1.0))[0] == stops
        )  # the maximum depth is reached


def test_svip_stops_at_high_entropy() -> None:
    control = TreeControl()
    agent = AGENTS["svip-tree"](control=control, threshold=0.6)
    assert agent.predict(observation_of(control, entropy=0.035))[0] == EXPAND  # √0.35 < 0.6 nats^½
    assert agent.predict(observation_of(control, entropy=0.037))[0] == 1 + control.budgets.index(7)


@pytest.mark.parametrize(("per_row", "budget"), [(0.0, 8), (0.05, 2), (0.2, 1), (1.0, 0)])
def test_expected_gain_chooses_best_budget_at_cost_per_row(per_row: float, budget: int) -> None:
    control = BudgetControl(budgets=(0, 1, 2, 4, 8))
    control.costs = table(per_row, draft=0.1)
    gains = np.array([0.0, 0.6, 0.2, 0.1, 0.05])
    agent = AGENTS["expected-gain"](control=control)
    worth = (1 + gains.cumsum()) / (0.2 + 1 + per_row * np.array(control.budgets))
    action, _ = agent.predict(observation_of(control, gains=gains / 13, expansions=1 / 12))
    assert action == np.argmax(worth) and control.budgets[action] == budget


def test_expected_gain_scale_reduces_budget() -> None:
    control = BudgetControl(budgets=(1, 8))
    control.costs = table(0.05)
    seen = observation_of(control, gains=np.array([0.5, 0.8]) / 13)
    assert [AGENTS["expected-gain"](control=control, scale=s).predict(seen)[0] for s in (1.0, 0.3)] == [1, 0]


@pytest.mark.parametrize(
    ("draft", "survival", "expands"),
    [
        (0.1, [0.9, 0.8], True),  # 0.8 · 0.8/0.9 more tokens for 0.1 s
        (0.1, [0.9, 0.1], False),  # 0.1 · 0.1/0.9 is too little
        (0.8, [0.9, 0.8], False),  # nor is the first enough at eight times the price
        (0.1, [0.5], True),  # S(−1) is 1, so the ratio is 0.5: 0.25 more tokens
        (0.1, [0.2], False),
        (0.1, [0.5, 0.6], True),  # a ratio above 1 is limited to 1
    ],
)
def test_expected_gain_expands_while_next_level_pays(draft: float, survival: list[float], expands: bool) -> None:
    control = TreeControl(budgets=(1, 7))
    control.costs = table(draft=draft)
    depth, reached = len(survival) - 1, sum(survival)
    seen = observation_of(control, survival=survival, expansions=depth / 12, gains=np.array([0.1, reached - 0.1]) / 13)
    agent = AGENTS["expected-gain"](control=control)
    assert agent.predict(seen)[0] == (EXPAND if expands else 2)
    ratio = min(1.0, survival[-1] / (survival[-2] if depth else 1.0))
    assert agent.next_level(seen) == pytest.approx(survival[-1] * ratio, rel=1e-5)
    now, next_one = 1 + (1 + depth) * draft, 1 + (2 + depth) * draft
    assert expands == ((1 + reached + survival[-1] * ratio) / next_one > (1 + reached) / now)


def test_expected_gain_does_not_expand_beyond_largest_budget() -> None:
    control = TreeControl(budgets=(1,))
    control.costs = table()
    seen = observation_of(control, survival=[0.95], gains=[0.9 / 13])
    assert AGENTS["expected-gain"](control=control).predict(seen)[0] == 1


def test_expected_gain_charges_only_nodes_in_tree() -> None:
    control = TreeControl(width=2, budgets=(1, 5, 95))
    control.costs = table(verify=0.1, draft=0.1)
    seconds = AGENTS["expected-gain"](control=control).seconds
    assert seconds.shape == (13, 3)
    np.testing.assert_allclose(seconds[0], [0.1 + 1.1, 0.1 + 1.2, 0.1 + 1.2])
    np.testing.assert_allclose(seconds[1], [0.2 + 1.1, 0.2 + 1.5, 0.2 + 1.6])


@pytest.mark.parametrize(("name", "kind"), [("expected-gain", TreeControl), ("ucb-budget", BudgetControl)])
def test_rule_without_costs_is_refused(name: str, kind: Any) -> None:
    control = kind()
    agent = AGENTS[name](control=control)
    with pytest.raises(ValueError, match="needs the seconds of forwards: set the control's costs to a CostTable"):
        agent.predict(observation_of(control), episode_start=np.array([True]))


def test_ucb_finds_best_budget() -> None:
    """The bandit recovers the tokens of the last cycle from the mean of four, also across the starts of texts."""
    control, rng = BudgetControl(budgets=(1, 3, 7, 31)), np.random.default_rng(0)
    control.costs = table(0.02)
    means = {1: 0.5, 3: 0.8, 7: 1.5, 31: 1.6}
    agent = AGENTS["ucb-budget"](control=control, discount=1.0)
    chosen: list[int] = []
    for _ in range(60):
        taken: list[int] = []
        for _ in range(25):
            recent = np.mean(taken[-4:]) / 13 if taken else 0.0
            seen = observation_of(control, recent=recent, expansions=1 / 12)
            budget = control.budgets[agent.predict(seen, episode_start=np.array([not taken]))[0]]
            assert agent.accepted == taken[-4:]
            taken.append(int(rng.binomial(2, means[budget] / 2)))
            chosen.append(budget)
    assert chosen[-500:].count(7) > 400


@pytest.mark.parametrize(
    ("name", "control", "message"),
    [
        ("ddd", KControl(), "DddAgent controls SpecDepth-v0 or SpecTree-v0, not SpecK-v0"),
        ("svip-tree", DepthControl(), "SvipTreeAgent controls SpecTree-v0, not SpecDepth-v0"),
        ("ucb-budget", TreeControl(), "UcbBudgetAgent controls SpecBudget-v0, not SpecTree-v0"),
        ("ddd", DepthControl(observation="ltd"), "looks at expansions, frontier, which the observation 'ltd' lacks"),
        ("ddd", TreeControl(budgets=(3, 9)), "budget is 7; expected one of 3, 9"),
    ],
)
def test_rules_refuse_unsuitable_problems(name: str, control: Control, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AGENTS[name](control=control)


def test_stanzas_cover_every_tree_rule() -> None:
    rules = {name for name, kind in AGENTS.items() if isinstance(kind, type) and issubclass(kind, TreeRule)}
    assert {load_experiment(*stanza).agent for stanza in STANZAS} == rules


@pytest.mark.parametrize(("env_id", "stanza"), STANZAS)
def test_rules_are_faster_than_plain(env_id: str, stanza: str, tiny: dict) -> None:
    """Each rule is faster than plain decoding on the tiny models, whose drafts are mostly accepted and cheap."""
    experiment = load_experiment(env_id, stanza)
    env = gym.make(env_id, **tiny).unwrapped
    control = make_control(env_id, {})
    control.costs = CostTable.load(tiny["clock"])
    agent = AGENTS[experiment.agent](control=control, **experiment.hyperparameters)
    rates, shapes = [], set()
    for seed in range(4):
        done = generation_under(env, control, agent, 60, seed)
        rates.append(done.tokens_per_second)
        shapes |= {(cycle.depth, cycle.verified) for cycle in done.cycles}
    assert np.mean(rates) > env.plain_rate
    assert len(shapes) > 1


def test_loaded_run_has_costs_of_its_clock(tiny: dict, tmp_path: Path) -> None:
    config = {"id": "SpecTree-v0", "env": tiny, "agent": "expected-gain", "hyperparameters": {}}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    control, agent = agents.load(tmp_path)
    assert control.costs == CostTable.load(tiny["clock"]) and agent.seconds.shape == (13, 13)


@pytest.mark.parametrize(("env_id", "stanza"), STANZAS)
def test_tuning_writes_valid_hyperparameters(
    env_id: str, stanza: str, tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["tune", env_id, "--agent", stanza, "--root", str(tmp_path), "--prompts", "2", "--tokens", "24"]
    arguments += ["--trials", "3", "--set", *(f"env.{key}={value}" for key, value in tiny.items())]
    monkeypatch.setattr(sys, "argv", arguments)
    tune.main()
    best = yaml.safe_load((tmp_path / env_id / stanza / "best.yml").read_text())["hyperparameters"]
    assert ("budget" in best) == (env_id == "SpecTree-v0" and stanza != "expected-gain")
    overrides = [f"hyperparameters.{key}={json.dumps(value)}" for key, value in best.items()]
    experiment = load_experiment(env_id, stanza, overrides)
    AGENTS[experiment.agent](control=make_control(env_id, experiment.env), **experiment.hyperparameters)
