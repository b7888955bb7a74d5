"""How a fresh policy starts, and which rewards it learns from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spec_envs.agents import AGENTS
from spec_envs.agents.sb3.vec_env import Floored, ReplayVecEnv
from spec_envs.controls import make_control
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.traces.plan import Plan
from tests.support.recordings import sizes

PPO = {"n_steps": 32, "batch_size": 512, "n_epochs": 4, "gamma": 1.0, "gae_lambda": 1.0, "learning_rate": 3e-3}
STEEP = CostTable("steep", {1: 1.0, 4: 1.2, 14: 20.0}, {1: 0.1, 3: 0.15})


@pytest.fixture
def keywords(traces: dict[str, Trace], plans: dict[str, Plan]) -> dict[str, Any]:
    own = {"episode": "cycle", "max_new_tokens": 20, "split": "all", **sizes(plans["tree"])}
    return {"trace": str(traces["tree"].folder), **own}


def chances(agent: Any, observations: np.ndarray) -> np.ndarray:
    """Return the chance of every action ``[n, actions]``."""
    with torch.no_grad():
        found: np.ndarray = agent.model.policy.get_distribution(torch.from_numpy(observations)).distribution.probs
    return np.asarray(found)


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.9])
def test_a_fresh_policy_drafts_on_with_the_chance(chance: float, keywords: dict[str, Any]) -> None:
    """Whatever the number of ends of a cycle: of 14 actions of SpecTree-v0 one goes on drafting."""
    control = make_control("SpecTree-v0", keywords)
    env = ReplayVecEnv.make("SpecTree-v0", 16, **keywords)
    env.seed(0)
    seen = env.reset()
    drafts = control.plans().drafts
    fresh = chances(AGENTS["ppo"](control=control, draft_chance=chance), seen)[:, drafts]
    assert fresh == pytest.approx(chance, abs=0.03)
    assert chances(AGENTS["ppo"](control=control), seen)[:, drafts] == pytest.approx(
        1 / control.action_space.n, abs=0.03
    )


@pytest.mark.parametrize("start", [{"draft_chance": 0.5}, {"reward_floor": -3.0}])
def test_ppo_learns_to_go_on_drafting(start: dict[str, float], keywords: dict[str, Any]) -> None:
    """Trees whose paths are all accepted, and verifications that cost more than they bring but for the first four rows:
    with neither setting PPO verifies before it has found out what a deeper tree is worth."""
    own = {**keywords, "budgets": list(range(1, 14))}
    control = make_control("SpecTree-v0", own)
    env = ReplayVecEnv.make("SpecTree-v0", 64, **own)
    plans, recorded = env.env.cycles.plans, env.env.cycles.accepted
    paths = np.minimum(plans.sizes + 1, plans.budgets)
    env.env.cycles.accepted = np.broadcast_to(paths, recorded.shape).astype(recorded.dtype)
    env.env.price([STEEP])
    agent = AGENTS["ppo"](control=control, num_envs=64, total_timesteps=32768, **start, **PPO)
    agent.learn(32768, env)
    env.seed(1)
    seen = env.reset()
    first = []
    for _ in range(20):
        actions = agent.predict(seen, deterministic=True)[0]
        first += [a == plans.drafts for a, row in zip(actions, seen, strict=True) if not control.drafted(row)]
        seen = env.step(actions)[0]
    assert np.mean(first) > 0.9


@pytest.mark.parametrize(("env_id", "agent"), [("SpecBudget-v0", "ppo"), ("SpecTree-v0", "dqn")])
def test_a_chance_that_has_no_effect_is_refused(env_id: str, agent: str) -> None:
    with pytest.raises(
        ValueError, match=f"draft_chance is 0.5, but {agent} does not decide with a probability whether {env_id}"
    ):
        AGENTS[agent](control=make_control(env_id, {}), draft_chance=0.5)


def test_low_rewards_are_raised_in_training_only(keywords: dict[str, Any]) -> None:
    plain, floored = (ReplayVecEnv.make("SpecTree-v0", 8, **keywords) for _ in range(2))
    wrapped = Floored(floored, -0.3)
    for env in (plain, wrapped):
        env.seed(0)
        env.reset()
    seen = []
    for step in range(30):
        actions = np.random.default_rng(step).integers(plain.env.choices, size=8)
        _, rewards, _, infos = plain.step(actions)
        _, raised, _, same = wrapped.step(actions)
        np.testing.assert_array_equal(raised, np.maximum(rewards, -0.3))
        assert [info.get("tokens") for info in infos] == [info.get("tokens") for info in same]
        for info, other in zip(infos, same, strict=True):
            if "episode" in info:
                assert info["episode"]["r"] == other["episode"]["r"]
        seen.append(rewards.min())
    assert min(seen) < -0.3
