"""The NumPy vector environment as a ``VecEnv`` of Stable-Baselines3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from spec_envs.agents import AGENTS
from spec_envs.agents.sb3.vec_env import ReplayVecEnv
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.traces.plan import Plan
from tests.support.recordings import sizes


@pytest.fixture
def keywords(traces: dict[str, Trace], plans: dict[str, Plan]) -> dict[str, Any]:
    return {"trace": str(traces["tree"].folder), "split": "all", "max_new_tokens": 20, **sizes(plans["tree"])}


def random_actions(env: VecEnv, steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(env.action_space.n, size=env.num_envs) for _ in range(steps)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("episode", ["prompt", "cycle"])
def test_steps_equal_those_of_vector_environment(episode: str, keywords: dict[str, Any]) -> None:
    env = ReplayVecEnv.make("SpecDepth-v0", 9, episode=episode, **keywords)
    same = ReplayVecEnv.make("SpecDepth-v0", 9, episode=episode, **keywords).env
    env.seed(3)
    seen = env.reset()
    np.testing.assert_array_equal(seen, same.reset(seed=3)[0])
    assert seen.shape == (9, *env.observation_space.shape) and seen.dtype == env.observation_space.dtype  # type: ignore[misc]
    paid: list[list[float]] = [[] for _ in range(9)]
    texts = episodes = 0
    for actions in random_actions(env, 60):
        seen, rewards, dones, infos = env.step(actions)
        there, theirs, terminated, _, arrays = same.step(actions)
        np.testing.assert_array_equal(seen, there)
        np.testing.assert_array_equal(dones, terminated)
        np.testing.assert_allclose(rewards, theirs, rtol=1e-6)
        assert all(env.observation_space.contains(row) for row in seen)
        assert rewards.dtype == np.float32 and dones.dtype == bool and len(infos) == 9
        for i, info in enumerate(infos):
            paid[i].append(theirs[i])
            assert bool(info) == bool(dones[i])
            if not dones[i]:
                continue
            episodes += 1
            assert info["TimeLimit.truncated"] is False
            np.testing.assert_array_equal(info["terminal_observation"], arrays["final_obs"][i])
            assert ("episode" in info) == ("_tokens" in arrays["final_info"] and arrays["final_info"]["_tokens"][i])
            if "episode" in info:
                texts += 1
                assert info["episode"]["r"] == pytest.approx(sum(paid[i]))
                assert info["episode"]["l"] == len(paid[i]) and info["episode"]["t"] > 0
                assert info["speedup"] == arrays["final_info"]["speedup"][i]
                paid[i] = []
    assert texts > 9 and (episodes > texts if episode == "cycle" else episodes == texts)


def test_reset_obeys_seed_and_texts(keywords: dict[str, Any]) -> None:
    env = ReplayVecEnv.make("SpecDepth-v0", 6, **keywords)
    runs = []
    for _ in range(2):
        env.seed(7)
        env.reset()
        runs.append([env.step(actions)[:3] for actions in random_actions(env, 30)])
    for first, second in zip(*runs, strict=True):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)
    env.set_options({"texts": np.arange(6)})
    env.reset()
    assert env.get_attr("text")[0].tolist() == list(range(6))
    assert not env.returns.any() and not env.lengths.any()


def test_attributes_are_shared_by_all_environments(keywords: dict[str, Any]) -> None:
    env = ReplayVecEnv.make("SpecDepth-v0", 5, **keywords)
    env.set_attr("policy_seconds", 0.25)
    assert env.get_attr("policy_seconds") == [0.25] * 5 and env.get_attr("policy_seconds", [1, 2]) == [0.25] * 2
    assert not env.has_attr("nonsense")
    env.env_method("price", env.env.cost_tables)
    for call in (lambda: env.set_attr("policy_seconds", 0.0, 1), lambda: env.env_method("price", [], indices=[0])):
        with pytest.raises(ValueError, match="leave indices out"):
            call()
    assert env.env_is_wrapped(Monitor) == [True] * 5 and env.env_is_wrapped(VecMonitor) == [False] * 5  # type: ignore[arg-type]
    env.close()


@pytest.mark.parametrize(
    ("algorithm", "num_envs", "settings"),
    [
        ("ppo", 256, {"n_steps": 64, "batch_size": 4096, "n_epochs": 1}),
        ("a2c", 32, {"n_steps": 8}),
        ("recurrent-ppo", 16, {"n_steps": 8, "batch_size": 32, "n_epochs": 1}),
        ("dqn", 16, {"learning_starts": 64, "buffer_size": 4000, "batch_size": 32}),
    ],
)
def test_algorithms_train(
    algorithm: str, num_envs: int, settings: dict[str, Any], keywords: dict[str, Any], tmp_path: Path
) -> None:
    env = ReplayVecEnv.make("SpecDepth-v0", num_envs, **keywords)
    agent = AGENTS[algorithm](control=env.env.control, num_envs=num_envs, **settings)
    assert agent.model._wrap_env(env) is env
    before = {name: t.clone() for name, t in agent.model.policy.state_dict().items()}
    agent.model.set_logger(configure(str(tmp_path), ["csv"]))
    steps = 2 * num_envs * settings.get("n_steps", 50)
    agent.learn(steps, env)
    assert agent.model.num_timesteps >= steps
    assert any((t != before[name]).any() for name, t in agent.model.policy.state_dict().items())
    assert "rollout/ep_rew_mean" in (tmp_path / "progress.csv").read_text().splitlines()[0]
    assert env.nothing == {}  # the shared info is still empty
    agent.save_checkpoint(tmp_path)
    again = AGENTS[algorithm](control=env.env.control, num_envs=num_envs, **settings)
    again.load_checkpoint(tmp_path)
    assert again.model.num_timesteps == agent.model.num_timesteps


def test_other_number_of_environments_is_refused(keywords: dict[str, Any]) -> None:
    env = ReplayVecEnv.make("SpecDepth-v0", 3, **keywords)
    with pytest.raises(ValueError, match=r"made for 1; make it with num_envs=3"):
        AGENTS["a2c"](control=env.env.control).learn(10, env)
    for wrong in (0, "two"):
        with pytest.raises(ValueError, match="num_envs is"):
            AGENTS["a2c"](control=env.env.control, num_envs=wrong)  # type: ignore[arg-type]


def test_works_with_evaluate_policy_and_vec_normalize(keywords: dict[str, Any]) -> None:
    env = ReplayVecEnv.make("SpecDepth-v0", 8, **keywords)
    agent = AGENTS["a2c"](control=env.env.control, num_envs=8)
    rewards, lengths = evaluate_policy(agent.model, env, n_eval_episodes=16, return_episode_rewards=True)
    assert len(rewards) == 16 and min(lengths) >= 1  # type: ignore[arg-type, type-var]
    wrapped = VecNormalize(env)
    wrapped.reset()
    for actions in random_actions(env, 30):
        wrapped.step(actions)
    assert env.nothing == {}
