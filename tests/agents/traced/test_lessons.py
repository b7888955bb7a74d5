"""Lessons of a trace: plans name cycles, lessons hold the outcome of every plan, outcomes predict them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from spec_envs.agents import AGENTS
from spec_envs.agents.traced.lessons import lessons_of, replay_of
from spec_envs.agents.traced.outcomes import ChainOutcomes, TreeOutcomes
from spec_envs.controls import make_control
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.controls.plans import Prices
from spec_envs.decoding.traces.full_trees import level_slice
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.runs import resolved
from spec_envs.experiments.traces.of_runs import trace_of
from spec_envs.vector.env import ReplayVectorEnv
from tests.support.lessons import random_lessons
from tests.support.traced import CASES, TABLE, control_of, costs_in

TREE = {"max_depth": 4, "width": 4, "max_new_tokens": 20}


@pytest.mark.parametrize("case", CASES)
def test_following_a_plan_gives_its_cycle(
    case: str,
    traces: dict[str, Trace],
    tmp_path: Path,
) -> None:
    env_id, name, keywords = CASES[case]
    shared = {"trace": str(traces[name].folder), "clock": costs_in(tmp_path), "max_new_tokens": 20, **keywords}
    env: Any = gym.make(env_id, **shared).unwrapped
    control, found = env.control, env.control.plans()
    assert found.levels == (1 if case in ("budget", "k") else found.deepest + 1)
    assert (found.first, found.chain) == (int(case == "depth"), case in ("k", "token", "drafted"))
    for plan, size in enumerate(found.sizes.tolist()):
        if size < found.first:
            continue
        observation, _ = env.reset(options={"prompt": env.prompts[1]})
        level, emitted = found.first, 0
        while not emitted:
            assert found.level(observation[None])[0] == (level if found.stepwise else 0)
            opened = found.open(found.level(observation[None]))[0]
            assert opened[plan] and (opened == (found.sizes >= level if found.stepwise else True)).all()
            action = found.actions(found.level(observation[None]), np.array([plan]))[0]
            observation, _, _, _, info = env.step(int(action))
            emitted, level = info["emitted"], level + 1
        drafted = size if found.chain else level_slice(size, control.width).stop
        assert info["drafted"] == drafted
        most = found.nodes[plan] + found.alternatives * drafted * found.chain
        assert found.nodes[plan] <= info["verified"] <= most
        assert found.nodes[plan] == min(drafted, found.budgets[plan])
        assert found.chain or found.budgets[plan] in control.budgets
    assert len(set(zip(found.sizes.tolist(), found.budgets.tolist(), strict=True))) == len(found.sizes)


def test_controls_without_plans_are_refused() -> None:
    for match, control in (
        ("not of SpecK-v0 with these settings", KControl(k_max=6, adjustment_interval=8)),
        ('depth is "random"', make_control("budget", {"depth": "random"})),
        ("not of SpecK-v0 with these settings", KControl(k_max=6, engine="llama-server")),
        ("not of SpecTopK-v0", make_control("topk", {})),
        ("lacks what is drafted", DepthControl(observation="ltd")),
        ("lacks what is drafted", KControl(decision="token", observation="counters")),
    ):
        for name in ("hindsight", "exact-pg"):
            with pytest.raises(ValueError, match=match):
                AGENTS[name](control=control)


def test_environments_in_numpy_refuse_a_partner(traces: dict[str, Trace]) -> None:
    """They would decide for it with its fixed value, and nobody would notice."""
    env, depth = gym.make("SpecBudget-v0", trace=str(traces["tree"].folder), **TREE), DepthControl(4, 4)
    assert replay_of(env, 2).num_envs == 2
    env.unwrapped.control.compose(depth, AGENTS["fixed"](control=depth, value=2))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="a partner decides in one environment at a time"):
        replay_of(env, 2)


def rows_beside(infos: dict[str, Any]) -> np.ndarray:
    """Return the seconds ``[8]`` that the alternatives beside chains add to each verification."""
    pairs = zip(infos["verified"].tolist(), infos["drafted"].tolist(), strict=True)
    seconds = lambda rows: TABLE.seconds("verify", rows + 1)  # noqa: E731
    return np.array(
        [seconds(verified) - seconds(drafted) if verified > drafted else 0.0 for verified, drafted in pairs]
    )


@pytest.mark.parametrize("case", CASES)
def test_lessons_equal_outcomes_in_environment(case: str, vectors: dict[str, ReplayVectorEnv]) -> None:
    env, found = copy.deepcopy(vectors[case]), control_of(case).plans()
    prices = found.prices(TABLE)
    observations, _ = env.reset(seed=0)
    begins, rng, everywhere, cycles = np.ones(8, bool), np.random.default_rng(0), np.arange(8), 0
    for _ in range(12):
        if begins.all():
            lessons = lessons_of(env, found, observations, everywhere)
            seconds = lessons.seconds(prices._replace(alternative=0.0))
            for plan in np.flatnonzero(found.sizes >= found.first):
                branch, seen, alive, level = copy.deepcopy(env), observations, np.ones(8, bool), found.first
                spent, brought, beside, further, verifying = np.zeros((5, 8))
                while alive.any():
                    at = np.full(8, level if found.stepwise else 0)
                    np.testing.assert_allclose(seen[alive], lessons.seen[alive, at[0]], atol=1e-6)
                    seen, infos = branch.step(found.actions(at, np.full(8, plan)))[0], branch.brought
                    spent += alive * infos["seconds"]["draft"]
                    ended = alive & (infos["emitted"] > 0)
                    alone = infos["seconds"]["verify"] - rows_beside(infos)
                    more = infos["verified"] - np.minimum(infos["drafted"], found.budgets[plan])
                    for kept, column in (
                        (brought, infos["emitted"]),
                        (beside, infos["beside"]),
                        (further, more),
                        (verifying, alone),
                    ):
                        kept[ended] = column[ended]
                    alive &= ~ended
                    level += 1
                np.testing.assert_array_equal(lessons.accepted[:, plan] + lessons.beside[:, plan], brought - 1)
                np.testing.assert_array_equal(lessons.worth[:, plan], brought)
                np.testing.assert_array_equal(lessons.beside[:, plan], beside)
                np.testing.assert_array_equal(lessons.further[:, plan], further)
                drafting = lessons.begun + lessons.forwards[:, plan] * prices.forward
                np.testing.assert_allclose(drafting, spent, atol=1e-6)
                np.testing.assert_allclose(seconds[:, plan], spent + verifying, atol=1e-6)
            cycles += 1
        # all environments follow one plan, so that their cycles end together
        plan = rng.choice(np.flatnonzero(found.sizes >= found.first))
        ended, level = False, found.first
        while not ended:
            at = np.full(8, level if found.stepwise else 0)
            observations = env.step(found.actions(at, np.full(8, plan)))[0]
            begins, level = env.brought["emitted"] > 0, level + 1
            ended = bool(begins.any())
        if not begins.all():
            break
    assert cycles > 3


def test_chain_outcomes_follow_from_hazards() -> None:
    found = ChainOutcomes(KControl(k_max=3, decision="token").plans())
    odds = lambda p: np.log(np.array(p) / (1 - np.array(p)))  # noqa: E731
    # alive; accepted 1, 2, 3; copied 1, 2, 3
    predicted = odds([[0.9, 0.8, 0.5, 0.4, 0.7, 0.6, 0.2]]).astype(np.float32)
    cost = np.array([[1.5]], np.float32)  # of a token
    for forward, verification in ((0.0, np.zeros(4)), (0.25, np.array([1.0, 1.5, 1.75, 3.0]))):
        found.price(0.5, Prices(forward, verification, 0.1), 0.0, 0.0)
        paid = [0, 0.3, 0.3 + 0.4, 0.3 + 0.4 + 0.8]
        worth = found.worth(predicted, np.array([0]), cost)[0] + 0.5 * (forward * np.array(paid) + verification)
        np.testing.assert_allclose(worth - worth[0], 1.5 * np.array([0, 0.8, 0.8 + 0.4, 0.8 + 0.4 + 0.16]), atol=1e-5)
        paid = [0, 0.4, 0.4 + 0.8]
        worth = found.worth(predicted, np.array([1]), cost)[0]
        assert worth[0] == -np.inf
        worth = worth[1:] + 0.5 * (forward * np.array(paid) + verification[1:])
        np.testing.assert_allclose(
            worth - worth[0], 1.5 * np.array([0, 0.9 * 0.5, 0.9 * 0.5 + 0.9 * 0.5 * 0.4]), atol=1e-5
        )
        assert np.isfinite(found.worth(predicted, np.array([3]), cost)).tolist() == [[False, False, False, True]]
    found.price(0.5, Prices(0.0, np.zeros(4), 0.1), 0.25, 2.0)  # a quarter of wrong tokens is caught by one of two
    worth = found.worth(predicted, np.array([0]), cost)[0]
    caught = 0.25 * np.array([0.2 * 0.3, 0.8 * 0.5 * 0.4, 0.4 * 0.6 * 0.8]).cumsum()
    gained = 1.5 * (np.array([0.8, 1.2, 1.36]) + caught) - 0.5 * 0.1 * 2 * np.array([0.3, 0.3 + 0.4, 0.3 + 0.4 + 0.8])
    np.testing.assert_allclose(worth[1:] - worth[0], gained, atol=1e-5)


@pytest.mark.parametrize("case", ["token", "depth", "tree", "budget"])
def test_maximum_likelihood_gives_mean_outcomes(case: str, vectors: dict[str, ReplayVectorEnv]) -> None:
    """One set of log-odds fitted to all observations predicts the plans' mean outcomes."""
    plans = control_of(case).plans()
    outcomes = ChainOutcomes(plans) if plans.chain else TreeOutcomes(plans)
    lessons = random_lessons(vectors[case], control_of(case))
    accepted, forwards = torch.from_numpy(lessons.accepted), torch.from_numpy(lessons.forwards)
    every = np.random.default_rng(0).choice([0.5, 2.0], len(accepted)).astype(np.float32)
    weight = torch.from_numpy(every)[:, None, None]
    predicted = torch.zeros(1, plans.levels, outcomes.outputs, requires_grad=True)
    optimizer = torch.optim.Adam([predicted], 0.1)
    for _ in range(600):
        optimizer.zero_grad()
        loss = outcomes.loss(predicted.expand(len(accepted), -1, -1), accepted, forwards, weight)
        loss.backward()
        optimizer.step()
    verification = np.linspace(1, 2, len(plans.sizes))
    for forward in (0.0, 0.3):
        outcomes.price(0.5, Prices(forward, verification, 0.0), 0.0, 0.0)
        for level in range(plans.first, min(plans.levels, plans.first + 3)):
            worth = outcomes.worth(predicted[0, [level]].detach().numpy(), np.array([level]), np.ones((1, 1)))[0]
            opened = plans.open(np.array([level]))[0]
            assert (np.isfinite(worth) == opened).all()
            ahead = np.maximum(0, lessons.forwards - lessons.forwards[:, [opened.argmax()]])
            means = np.average(lessons.accepted - 0.5 * (ahead * forward + verification), 0, every)
            np.testing.assert_allclose((worth - worth.max())[opened], (means - means[opened].max())[opened], atol=0.02)


def test_run_uses_the_named_trace(traces: dict[str, Trace], tmp_path: Path) -> None:
    experiment = load_experiment("SpecK-v0", "hindsight", [f"env.trace={traces['copies'].folder}", "record=[4,1,2]"])
    config = resolved(experiment, "SpecK-v0", "hindsight", 0)
    found = trace_of(tmp_path / "SpecK-v0" / "hindsight-0", vars(config))
    assert found.folder == traces["copies"].folder
    assert not list(tmp_path.iterdir())


def test_replay_of_has_settings_of_the_environment(traces: dict[str, Trace], tmp_path: Path) -> None:
    env_id, name, keywords = CASES["tree"]
    shared = {"trace": str(traces[name].folder), "clock": costs_in(tmp_path), "max_new_tokens": 20, **keywords}
    many = replay_of(gym.make(env_id, **shared), num_envs=5)
    assert (many.num_envs, many.max_new_tokens, many.control.budgets) == (5, 20, keywords["budgets"])
    assert replay_of(many) is many
