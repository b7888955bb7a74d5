"""Environments in NumPy: what as many single ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from experiments.trace import Plan
from spec_envs.decoding.trace import Trace

COUNT = 7
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("SpecDepth-v0", "tree", {"budget": 5}),
    ("SpecDepth-v0", "tree", {"observation": "ltd", "reward": "ltd", "episode": "cycle"}),
    ("SpecBudget-v0", "tree", {"depth": 2, "budgets": (0, 1, 3, 9, 30)}),
    ("SpecBudget-v0", "tree", {"depth": 0, "observation": "ltd", "reward": "ltd", "episode": "cycle"}),
    ("SpecTree-v0", "tree", {"cost_features": True}),
    ("SpecTree-v0", "tree", {"episode": "cycle", "pace": 3.0}),
    ("SpecK-v0", "chain", {}),
    ("SpecK-v0", "copies", {"cost_features": True}),
    ("SpecK-v0", "copies", {"observation": "counters"}),
    ("SpecK-v0", "copies", {"decision": "token"}),
    ("SpecK-v0", "lookup", {"decision": "token", "k_max": 3}),
]


def sizes(plan: Plan) -> dict[str, Any]:
    return {key: plan.env[key] for key in ("max_depth", "width", "k_max") if key in plan.env}


def make_vector(env_id: str, count: int, **keywords: Any) -> Any:
    return gym.make_vec(env_id, num_envs=count, vectorization_mode="vector_entry_point", **keywords)


@pytest.mark.parametrize(("env_id", "name", "keywords"), CASES)
def test_it_is_as_many_single_environments(
    env_id: str,
    name: str,
    keywords: dict[str, Any],
    traces: dict[str, Trace],
    plans: dict[str, Plan],
) -> None:
    shared = {"trace": str(traces[name].folder), "split": "all", "max_new_tokens": 20, "policy_seconds": 1e-4}
    shared |= sizes(plans[name]) | keywords
    many = make_vector(env_id, COUNT, **shared)
    single: list[Any] = [gym.make(env_id, **shared).unwrapped for _ in range(COUNT)]
    texts = np.arange(COUNT)
    seen, _ = many.reset(seed=0, options={"texts": texts})
    firsts = [env.reset(seed=1, options={"prompt": env.prompts[t]})[0] for env, t in zip(single, texts, strict=True)]
    np.testing.assert_allclose(seen, firsts, atol=2e-6)
    rng, alive, steps = np.random.default_rng(0), np.ones(COUNT, bool), 0
    while alive.any():
        actions = rng.integers(many.single_action_space.n, size=COUNT)
        seen, rewards, terminated, truncated, infos = many.step(actions)
        assert not truncated.any()
        for i in np.flatnonzero(alive):
            observation, reward, done, _, info = single[i].step(actions[i])
            assert done == terminated[i] and reward == pytest.approx(rewards[i], abs=1e-9)
            for key in ("emitted", "accepted", "drafted", "verified", "saved"):
                assert info[key] == pytest.approx(infos[key][i]), key
            assert info["seconds"] == pytest.approx({part: s[i] for part, s in infos["seconds"].items()})
            np.testing.assert_allclose(infos["final_obs"][i] if done else seen[i], observation, atol=2e-6)
            steps += 1
            if single[i].decoder.finished:
                assert infos["_final_info"][i] and infos["final_info"]["task"][i] == info["task"]
                assert infos["final_info"]["tokens"][i] == info["tokens"]
                assert infos["final_info"]["speedup"][i] == pytest.approx(info["speedup"])
                alive[i] = False
            elif done:
                single[i].reset()
    assert steps > 40


def test_seeds_repeat_and_texts_are_drawn_anew(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    keywords = {"trace": str(traces["tree"].folder), "max_new_tokens": 20, "depth": "random", **sizes(plans["tree"])}
    runs = []
    for _ in range(2):
        env = make_vector("SpecBudget-v0", 16, **keywords)
        env.reset(seed=5)
        env.action_space.seed(5)
        runs.append([env.step(env.action_space.sample())[:3] for _ in range(60)])
    for first, second in zip(*runs, strict=True):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)
    assert env.played == 60 * 16  # each decision is a cycle
    assert len(set(env.text)) > 1 and set(env.text) <= set(traces["tree"].of_split("train"))


def test_one_of_several_tables_prices_a_text(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    tables = ["qwen3-14b-a6000", "smollm2-135m-int8-xeon-amx-2"]
    env = make_vector(
        "SpecDepth-v0", 32, trace=str(traces["tree"].folder), clock=tables, max_new_tokens=20, **sizes(plans["tree"])
    )
    env.reset(seed=0)
    assert set(env.play.clock) == {0, 1}
    *_, infos = env.step(np.zeros(32, int))
    slow = env.play.clock == 0  # may have changed where a text ended, which none has after one cycle
    assert infos["seconds"]["verify"][slow].min() > infos["seconds"]["verify"][~slow].max()


def test_what_means_nothing_here_is_refused(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    tree, chain = str(traces["tree"].folder), str(traces["chain"].folder)
    for match, env_id, keywords in (
        ("give trace=FOLDER", "SpecDepth-v0", {}),
        ("one of chains", "SpecDepth-v0", {"trace": chain}),
        ("adjustment_interval", "SpecK-v0", {"trace": chain, "adjustment_interval": 8, "k_max": 6}),
        ("render_mode means nothing", "SpecDepth-v0", {"trace": tree, "render_mode": "ansi", **sizes(plans["tree"])}),
        ('needs episode="cycle"', "SpecDepth-v0", {"trace": tree, "reward": "ltd"}),
        ("recorded up to 24", "SpecDepth-v0", {"trace": tree, "max_new_tokens": 99, **sizes(plans["tree"])}),
    ):
        with pytest.raises(ValueError, match=match):
            make_vector(env_id, 2, **{"max_new_tokens": 20, **keywords})
    with pytest.raises(TypeError, match="did you mean 'budget'"):
        make_vector("SpecDepth-v0", 2, trace=tree, bugdet=3)
    env = make_vector("SpecDepth-v0", 2, trace=tree, max_new_tokens=20, **sizes(plans["tree"]))
    with pytest.raises(ValueError, match="expected 2 indices"):
        env.reset(options={"texts": [0, 99]})
    env.reset()
    with pytest.raises(ValueError, match="actions are not 2"):
        env.step(np.array([0, 2]))


def test_replaying_trees_needs_no_models(
    traces: dict[str, Trace],
    plans: dict[str, Plan],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Replaying trees reads neither weights nor a tokenizer."""

    def refuse(*args: Any, **keywords: Any) -> None:
        raise AssertionError("a model was asked for")

    for name in ("load_target", "load_tokenizer", "load_weights"):
        monkeypatch.setattr(f"spec_envs.decoding.pair.{name}", refuse)
    env = make_vector("SpecDepth-v0", 4, trace=str(traces["tree"].folder), max_new_tokens=20, **sizes(plans["tree"]))
    env.reset(seed=0)
    env.step(np.ones(4, int))
    assert env.played == 0  # all have expanded, nothing is verified
    env.step(np.zeros(4, int))
    assert env.played == 4
