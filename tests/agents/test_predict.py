"""``predict`` of every agent as Stable-Baselines3 calls it, for one observation and for a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from spec_envs import ENVIRONMENTS
from spec_envs.agents import AGENTS
from spec_envs.agents.sb3.agent import ALGORITHMS
from spec_envs.controls import make_control
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.trace import Trace
from spec_envs.env import SpecEnv
from tests.support.rollouts import drafter_of

PROFILE = {"trace": "qwen2.5-coder-32b-cpu", "max_new_tokens": 48}
TOKEN = PROFILE | {"decision": "token"}
TREE = {"max_depth": 4, "width": 4, "max_new_tokens": 20}
PLACES: list[tuple[str, dict[str, Any]]] = [  # an agent is tried in the first environment that it can control
    ("SpecK-v0", PROFILE),
    ("SpecK-v0", TOKEN),
    ("SpecTree-v0", TREE),
    ("SpecBudget-v0", TREE),
    ("SpecDVI-v0", {"drafter": "auto", "block": 2, "draft_temperature": 1.0}),
    ("SpecTopK-v0", {"trace": "smollm2-135m-topk", "observation": "rl_adapter", "max_new_tokens": 24}),
    *((env_id, {}) for env_id in ENVIRONMENTS),
]
PREFERRED: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("hindsight", "exact-pg", "decision-tree"), ("SpecDepth-v0", TREE)),
    **dict.fromkeys(ALGORITHMS, ("SpecK-v0", TOKEN)),
}
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "fixed": {"value": 2},
    **{name: {"hidden": 8} for name in ("hindsight", "exact-pg")},
    **{name: {"pi_arch": [8], "vf_arch": [8]} for name in ALGORITHMS},
}


@pytest.fixture
def make_pair(traces: dict[str, Trace], tiny: dict[str, Any]) -> Callable[[str], tuple[SpecEnv, Any]]:
    """Return a function from an agent's name to a new environment and agent."""

    def make(name: str) -> tuple[SpecEnv, Any]:
        refused = []
        for env_id, given in [PREFERRED[name]] if name in PREFERRED else PLACES:
            keywords = given
            if given is TREE:
                keywords = given | {"trace": str(traces["tree"].folder)}
            elif "trace" not in given:
                keywords = tiny | drafter_of(env_id, tiny) | given
            control = make_control(env_id, keywords)
            control.costs = CostTable.load("qwen3-14b-a6000")
            try:
                agent: Any = AGENTS[name](control=control, **HYPERPARAMETERS.get(name, {}))
            except ValueError as error:
                refused.append(str(error))
                continue
            env: Any = gym.make(env_id, **keywords).unwrapped
            if control.exit:
                agent.bind(env.decoder)
            return env, agent
        raise ValueError(f"{name} controls no environment: {refused}")

    return make


def by_hand(env: SpecEnv, agent: Any, seed: int, episodes: int) -> tuple[list[float], list[int]]:
    """Return total rewards and lengths of episodes in which actions are predicted one observation at a time."""
    observation, _ = env.reset(seed=seed)
    state, start, rewards, lengths = None, np.array([True]), [0.0], [0]
    while True:
        action, state = agent.predict(observation, state, start, deterministic=True)
        observation, reward, done, _, _ = env.step(action)
        rewards[-1], lengths[-1], start = rewards[-1] + reward, lengths[-1] + 1, np.array([done])
        if done:
            if len(rewards) == episodes:
                return rewards, lengths
            observation, _ = env.reset()
            rewards.append(0.0)
            lengths.append(0)


@pytest.mark.parametrize("name", AGENTS)
def test_evaluate_policy_equals_own_loop(name: str, make_pair: Callable[[str], tuple[SpecEnv, Any]]) -> None:
    env, agent = make_pair(name)
    vectorized = DummyVecEnv([lambda: env])
    vectorized.seed(5)
    found = evaluate_policy(agent, vectorized, n_eval_episodes=3, return_episode_rewards=True, warn=False)
    rewards, lengths = by_hand(*make_pair(name), 5, 3)
    assert found[1] == lengths
    np.testing.assert_allclose(found[0], rewards, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in AGENTS if name != "random"])
def test_batch_keeps_state_per_environment(name: str, make_pair: Callable[[str], tuple[SpecEnv, Any]]) -> None:
    """A batch of three environments gets the actions that three separate agents predict, recurrent states and
    memories included."""
    many = make_pair(name)[1]
    alone = [make_pair(name) for _ in range(3)]
    singles, envs = [agent for _, agent in alone], [env for env, _ in alone]
    seen = np.array([env.reset(seed=i)[0] for i, env in enumerate(envs)])
    states: Any = None
    own: list[Any] = [None] * 3
    starts = np.ones(3, bool)
    for _ in range(40):
        actions, states = many.predict(seen, states, starts, deterministic=True)
        assert isinstance(actions, np.ndarray) and actions.shape == (3,) and actions.dtype.kind == "i"
        for i, env in enumerate(envs):
            action, own[i] = singles[i].predict(seen[i], own[i], starts[i : i + 1], deterministic=True)
            assert action == actions[i]
            seen[i], _, starts[i], _, _ = env.step(actions[i])
            if starts[i]:
                seen[i], _ = env.reset()


def test_random_actions_differ_within_batch(make_pair: Callable[[str], tuple[SpecEnv, Any]]) -> None:
    env, agent = make_pair("random")
    actions, _ = agent.predict(np.zeros((50, *env.observation_space.shape), np.float32))  # type: ignore[misc]
    assert len(set(actions.tolist())) > 5


@pytest.mark.parametrize("name", AGENTS)
def test_wrong_shapes_are_refused(name: str, make_pair: Callable[[str], tuple[SpecEnv, Any]]) -> None:
    env, agent = make_pair(name)
    [size] = env.observation_space.shape  # type: ignore[misc]
    for shape in ((size + 1,), (2, size - 1), (1, 2, size), (), (0, size), (0,)):
        with pytest.raises(ValueError, match=r"the observation has the shape .* was made for"):
            agent.predict(np.zeros(shape, np.float32))
    two = np.zeros((2, size), np.float32)
    _, state = agent.predict(two, deterministic=True)
    with pytest.raises(ValueError, match="episode_start has the shape"):
        agent.predict(two, state, np.ones(3, bool))
    for wrong in (state[:1], [None, None], [*state, state[0]]):
        with pytest.raises(ValueError, match="state is not that of 2 environments"):
            agent.predict(two, wrong, np.zeros(2, bool))
