"""Agents that learn from traces choose between drafters, each action of which has a price of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from spec_envs.agents import AGENTS
from spec_envs.agents.traced.lessons import collected
from spec_envs.controls.drafter import DrafterControl
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.experiments.choosing.outcomes import Outcomes
from spec_envs.vector.env import ReplayVectorEnv
from tests.support.recordings import costs_of

if TYPE_CHECKING:
    from spec_envs.experiments.traces.plan import Plan

TOKENS = 20
SMALL = {"hidden": 32, "cycles": 512, "steps": 300, "batch_size": 64, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def env(portfolio: PortfolioTrace, portfolio_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> ReplayVectorEnv:
    sizes = {key: portfolio_plan.env[key] for key in ("sizes", "depths", "width", "drafter", "target")}
    clock = costs_of(portfolio, tmp_path_factory.mktemp("costs"))
    shared = {"trace": str(portfolio.folder), "clock": clock, "max_new_tokens": TOKENS, "split": "all"}
    return ReplayVectorEnv("SpecDrafter-v0", 8, **shared, **sizes)


@pytest.fixture(scope="module")
def outcomes(env: ReplayVectorEnv, portfolio: PortfolioTrace) -> Outcomes:
    control = env.control
    assert isinstance(control, DrafterControl)
    return Outcomes(portfolio, control, env.cost_tables[0], env.texts.tolist(), TOKENS)


@pytest.fixture(scope="module")
def least(outcomes: Outcomes) -> np.ndarray:
    """Return the fewest seconds of every text ``[texts]``."""
    return np.array([found.seconds for found in outcomes.clairvoyant()])


def test_lessons_have_the_tokens_of_every_action(env: ReplayVectorEnv, outcomes: Outcomes) -> None:
    env, seen = copy.deepcopy(env), []
    rng = np.random.default_rng(0)

    def actor(observations: np.ndarray) -> np.ndarray:
        rows = env.under_way.row.copy()
        seen.append((rows, env.last - rows))
        return rng.integers(env.choices, size=len(observations))

    lessons = collected(env, actor, env.control.plans(), 200, seed=0)
    rows, left = (np.concatenate(column) for column in zip(*seen, strict=True))
    found = np.minimum(outcomes.accepted[rows], left[:, None] - 1)
    np.testing.assert_array_equal(lessons.accepted[: len(found)], found)
    assert (outcomes.accepted <= env.control.plans().longest).all()


@pytest.mark.parametrize("name", ["hindsight", "exact-pg"])
def test_learns_to_choose(
    name: str, env: ReplayVectorEnv, outcomes: Outcomes, least: np.ndarray, tmp_path: Path
) -> None:
    """It beats the mean of the best and the worst static setting, no policy beats the clairvoyant one, and a copy that
    is loaded decides alike."""
    agent: Any = AGENTS[name](control=env.control, seed=1, **SMALL).learn(0, copy.deepcopy(env))
    static = outcomes.static().sum(0)
    seconds = played(env, agent)
    assert seconds.sum() < (static.min() + static.max()) / 2
    assert (seconds >= least - 1e-9).all()
    agent.save(tmp_path)
    again = AGENTS[name](control=env.control, seed=2, **SMALL)
    again.load(tmp_path)
    again.control.costs = env.cost_tables[0]
    seen, _ = copy.deepcopy(env).reset(seed=3)
    assert [again.predict(one)[0] for one in seen] == agent.actions(seen).tolist()


def test_tree_learns_to_choose(env: ReplayVectorEnv, outcomes: Outcomes) -> None:
    tree: Any = AGENTS["decision-tree"](control=env.control, decisions=1024).learn(0, copy.deepcopy(env))
    static = outcomes.static().sum(0)
    assert played(env, tree).sum() < (static.min() + static.max()) / 2


def test_hindsight_asks_nobody_where_drafting_is_dear(env: ReplayVectorEnv) -> None:
    agent: Any = AGENTS["hindsight"](control=env.control, seed=1, **SMALL).learn(0, copy.deepcopy(env))
    agent.price(CostTable("dear", {1: 1.0, 2: 50.0}, {1: 90.0}))
    seen, _ = copy.deepcopy(env).reset(seed=3)
    assert (agent.actions(seen) == 0).all()


def played(env: ReplayVectorEnv, agent: Any) -> np.ndarray:
    """Return the seconds of every text under an agent ``[texts]``."""
    env = copy.deepcopy(env)
    seen, _ = env.reset(seed=0, options={"texts": np.resize(env.texts, env.num_envs)})
    alive, spent = np.ones(env.num_envs, bool), np.zeros(env.num_envs)
    while alive.any():
        seen, _, terminated, _, _ = env.step(agent.predict(seen, deterministic=True)[0])
        spent += alive * sum(env.brought["seconds"].values())
        alive &= ~terminated
    return spent[: len(env.texts)]
