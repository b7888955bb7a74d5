"""A NumPy vector environment behaves like as many single environments."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.traces.plan import Plan
from spec_envs.vector.draws import Draws
from spec_envs.vector.env import ReplayVectorEnv
from tests.support.recordings import sizes

COUNT = 7
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("SpecDepth-v0", "tree", {"budget": 5}),
    ("SpecDepth-v0", "tree", {"observation": "ltd", "reward": "ltd", "episode": "cycle"}),
    ("SpecBudget-v0", "tree", {"depth": 2, "budgets": (0, 1, 3, 9, 30)}),
    ("SpecBudget-v0", "tree", {"depth": "random", "clock": ["qwen3-14b-a6000", "smollm2-135m-int8-xeon-amx-2"]}),
    ("SpecBudget-v0", "tree", {"depth": "random", "episode": "cycle"}),
    ("SpecBudget-v0", "tree", {"depth": 0, "observation": "ltd", "reward": "ltd", "episode": "cycle"}),
    ("SpecTree-v0", "tree", {"cost_features": True}),
    ("SpecTree-v0", "tree", {"episode": "cycle", "pace": 3.0}),
    ("SpecDepth-v0", "copied tree", {"budget": 5}),
    ("SpecBudget-v0", "copied tree", {"depth": "random", "clock": ["qwen3-14b-a6000", "smollm2-135m-int8-xeon-amx-2"]}),
    ("SpecBudget-v0", "suffix tree", {"depth": 2, "observation": "ltd", "budgets": (0, 1, 3, 9, 30)}),
    ("SpecTree-v0", "copied tree", {"episode": "cycle", "max_depth": 2}),
    ("SpecDepth-v0", "blocks", {"budget": 5}),
    ("SpecBudget-v0", "blocks", {"depth": "random", "clock": "smollm2-135m-int8-xeon-amx-2", "max_depth": 3}),
    ("SpecK-v0", "chain", {}),
    ("SpecK-v0", "copies", {"cost_features": True}),
    ("SpecK-v0", "copies", {"observation": "counters"}),
    ("SpecK-v0", "copies", {"decision": "token"}),
    ("SpecK-v0", "lookup", {"decision": "token", "k_max": 3}),
]


def make_vector(env_id: str, count: int, **keywords: Any) -> Any:
    return gym.make_vec(env_id, num_envs=count, vectorization_mode="vector_entry_point", **keywords)


def assert_same_infos(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Assert that infos are alike: the same names and masks, and equal values where a mask is true."""
    assert set(mine) == set(theirs)
    for name, value in theirs.items():
        if isinstance(value, dict):
            assert_same_infos(mine[name], value)
        elif name == "final_obs":
            for i in np.flatnonzero(theirs["_final_obs"]):
                np.testing.assert_allclose(mine[name][i], value[i], atol=2e-6)
        elif value.dtype == float:
            np.testing.assert_allclose(mine[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
        else:
            assert mine[name].dtype == value.dtype and mine[name].tolist() == value.tolist(), name


@pytest.mark.parametrize(
    ("env_id", "name", "keywords", "mode"),
    [(*case, mode) for case, mode in zip(CASES, itertools.cycle(AutoresetMode), strict=False)],
)
def test_equals_vector_of_single_environments(
    env_id: str,
    name: str,
    keywords: dict[str, Any],
    mode: AutoresetMode,
    traces: dict[str, Trace],
    plans: dict[str, Plan],
) -> None:
    """Every step equals that of Gymnasium's vector environment under the same seeds, whatever the autoreset mode."""
    shared = {"trace": str(traces[name].folder), "split": "all", "max_new_tokens": 20, "policy_seconds": 1e-4}
    shared |= sizes(plans[name]) | keywords
    many = make_vector(env_id, COUNT, **shared, autoreset_mode=mode)
    single: Any = gym.make_vec(
        env_id, COUNT, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **shared
    )
    assert isinstance(many, ReplayVectorEnv) and many.metadata["autoreset_mode"] == mode
    seeds: Any
    rng, ended, last = np.random.default_rng(0), 0, np.zeros(COUNT, bool)
    for seeds in ([3 * i for i in range(COUNT)], 11, None):
        (seen, infos), (theirs, their_infos) = many.reset(seed=seeds), single.reset(seed=seeds)
        np.testing.assert_allclose(seen, theirs, atol=2e-6)
        assert_same_infos(infos, their_infos)
        last[:] = False
        for _ in range(80):
            if mode == AutoresetMode.DISABLED and last.any():
                (seen, infos), (theirs, their_infos) = (
                    env.reset(options={"reset_mask": last.copy()}) for env in (many, single)
                )
                np.testing.assert_allclose(seen[last], theirs[last], atol=2e-6)
                assert_same_infos(infos, their_infos)
            actions = rng.integers(many.single_action_space.n, size=COUNT)
            seen, rewards, last, truncated, infos = many.step(actions)
            theirs, their_rewards, their_last, _, their_infos = single.step(actions)
            np.testing.assert_allclose(seen, theirs, atol=2e-6)
            np.testing.assert_allclose(rewards, their_rewards, atol=1e-9)
            assert last.tolist() == their_last.tolist() and not truncated.any()
            assert_same_infos(infos, their_infos)
            ended += last.sum()
    assert ended >= COUNT


def test_texts_option_sets_the_texts(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    shared = {"trace": str(traces["tree"].folder), "split": "all", "max_new_tokens": 20, **sizes(plans["tree"])}
    many, single = make_vector("SpecDepth-v0", COUNT, **shared), gym.make("SpecDepth-v0", **shared).unwrapped
    seen, _ = many.reset(seed=0, options={"texts": np.arange(COUNT)})
    for i in range(COUNT):
        np.testing.assert_allclose(seen[i], single.reset(seed=1, options={"prompt": single.prompts[i]})[0], atol=2e-6)


def test_rollouts_are_reproducible_and_draw_new_texts(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
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
    assert env.forwards == 60 * 16  # each decision is a cycle
    assert len(set(env.text)) > 1 and set(env.text) <= set(traces["tree"].of_split("train"))


def test_each_environment_has_its_own_seed(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    """A list has one seed per environment, a number is counted up, and one environment does not affect another."""
    shared = {"trace": str(traces["tree"].folder), "split": "all", "max_new_tokens": 20, **sizes(plans["tree"])}
    env = make_vector("SpecDepth-v0", 6, **shared)

    def texts(seed: Any) -> list[list[int]]:
        env.reset(seed=seed)
        seen = [env.text.tolist()]
        for _ in range(40):
            env.step(np.zeros(6, int))
            seen.append(env.text.tolist())
        return np.transpose(seen).tolist()

    one, other = texts([1, 2, 3, 4, 5, 6]), texts([1, 20, 3, 40, 50, 60])
    assert one[0] == other[0] and one[2] == other[2] and one != other
    assert one == texts(1) == texts((1, 2, 3, 4, 5, 6)) and texts([7, 7, 7, 7, 7, 7])[1:] == texts([7] * 6)[:-1]
    for wrong in ([1, 2], [], [1] * 7, "123456", 1.5, {1, 2, 3, 4, 5, 6}, np.arange(6)):
        with pytest.raises(ValueError, match=r"seed is .*expected a whole number, or a list of 6"):
            env.reset(seed=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"call reset\(\) first"):
            env.step(np.zeros(6, int))
    for wrong in (-1, [-1] * 6, [1, 2, 3, 4, 5, "6"], [1.5] * 6):
        with pytest.raises(gym.error.Error, match="Seed must be"):
            env.reset(seed=wrong)  # type: ignore[arg-type]
    env.reset(seed=2**70)


def test_draws_equal_numpy() -> None:
    many, single = Draws(5), [seeding.np_random(i)[0] for i in range(5)]
    many.seed(range(5), np.arange(5))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        which, below = np.flatnonzero(rng.random(5) < 0.6), int(rng.choice([1, 2, 3, 7, 5000, 2**31 + 1, 3 * 10**9]))
        assert many.integers(which, below).tolist() == [single[i].integers(below) for i in which]


@pytest.mark.parametrize("case", [("SpecBudget-v0", "tree", {"depth": "random"}), ("SpecK-v0", "copies", {})])
def test_copies_continue_from_the_same_state(
    case: tuple[str, str, dict[str, Any]], traces: dict[str, Trace], plans: dict[str, Plan]
) -> None:
    env_id, name, keywords = case
    env = make_vector(env_id, 5, trace=str(traces[name].folder), max_new_tokens=20, **sizes(plans[name]) | keywords)
    env.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(7):
        env.step(rng.integers(env.choices, size=5))
    copies = [pickle.loads(pickle.dumps(env)), copy.deepcopy(env)]
    assert copies[0].trace is env.trace  # the trace is shared within a process, not copied
    for _ in range(60):
        actions = rng.integers(env.choices, size=5)
        seen, rewards, *_ = env.step(actions)
        for other in copies:
            theirs, their_rewards, *_ = other.step(actions)
            np.testing.assert_array_equal(seen, theirs)
            np.testing.assert_array_equal(rewards, their_rewards)


def test_attributes_are_read_and_set(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    env = make_vector("SpecDepth-v0", 3, trace=str(traces["tree"].folder), max_new_tokens=20, **sizes(plans["tree"]))
    env.reset(seed=0)
    assert env.get_attr("max_new_tokens") == (20, 20, 20) == env.call("max_new_tokens")
    assert list(env.get_attr("text")) == env.text.tolist()
    env.set_attr("policy_seconds", 0.5)
    assert env.get_attr("policy_seconds") == (0.5, 0.5, 0.5)
    env.set_attr("policy_seconds", [0.25, 0.25, 0.25])
    assert env.step(np.zeros(3, int))[4]["seconds"]["policy"].tolist() == [0.25] * 3
    for name, values in (("policy_seconds", [1, 2, 3]), ("policy_seconds", [1, 1]), ("polcy_seconds", 1)):
        with pytest.raises(ValueError, match=r"expected one, or 3 that are equal|no attribute 'polcy_seconds'"):
            env.set_attr(name, values)
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(np.zeros(3, int))):
        with pytest.raises(ValueError, match="the environments are closed"):
            call()  # type: ignore[operator]


def test_make_vec_chooses_kind_of_vector_environment(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    """The environment is in NumPy if it replays a recorded trace, else it consists of single environments."""
    shared = {"trace": str(traces["tree"].folder), "max_new_tokens": 20, **sizes(plans["tree"])}
    assert isinstance(gym.make_vec("SpecDepth-v0", 2, **shared), ReplayVectorEnv)
    copies = {"trace": str(traces["copies"].folder), "max_new_tokens": 20, "k_max": 6, "adjustment_interval": 4}
    for env_id, keywords, mode in (
        ("SpecDepth-v0", {**shared, "render_mode": "ansi"}, None),
        ("SpecDepth-v0", {**shared, "switch_every": 2}, None),
        ("SpecDepth-v0", {**shared, "max_episode_steps": 3}, AutoresetMode.NEXT_STEP),
        ("SpecK-v0", copies, "Disabled"),
        ("SpecK-v0", {"trace": "qwen2.5-coder-32b-cpu", "max_new_tokens": 20}, "NextStep"),
    ):
        env = gym.make_vec(env_id, num_envs=2, **keywords, **({"autoreset_mode": mode} if mode else {}))
        assert isinstance(env, SyncVectorEnv) and env.num_envs == 2
        assert env.metadata["autoreset_mode"] == AutoresetMode(mode or "SameStep")
        env.reset(seed=0)
        done = [env.step(np.zeros(2, int))[3] for _ in range(3)]
        if "max_episode_steps" in keywords:
            assert not done[0].any() and done[2].all()
        again = gym.make_vec(env.spec)
        assert isinstance(again, SyncVectorEnv) and again.num_envs == 2
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'max_dept'.*did you mean 'max_depth'"):
        gym.make_vec("SpecDepth-v0", 2, **shared, max_dept=3)
    with pytest.raises(ValueError, match="autoreset_mode is 'never'; expected one of"):
        gym.make_vec("SpecDepth-v0", 2, **shared, autoreset_mode="never")


def test_record_episode_statistics(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    """Gymnasium's wrapper counts the same episodes for both kinds."""
    shared = {"trace": str(traces["tree"].folder), "split": "all", "max_new_tokens": 20, **sizes(plans["tree"])}
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        mine: Any = RecordEpisodeStatistics(make_vector("SpecDepth-v0", 4, **shared, autoreset_mode=mode))
        sync = gym.make_vec(
            "SpecDepth-v0", 4, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **shared
        )
        theirs: Any = RecordEpisodeStatistics(sync)
        mine.reset(seed=0)
        theirs.reset(seed=0)
        rng = np.random.default_rng(0)
        for _ in range(60):
            actions = rng.integers(2, size=4)
            mine.step(actions)
            theirs.step(actions)
        assert len(mine.return_queue) > 4 and list(mine.length_queue) == list(theirs.length_queue)
        np.testing.assert_allclose(list(mine.return_queue), list(theirs.return_queue))


def test_one_of_several_tables_is_drawn_per_text(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    tables = ["qwen3-14b-a6000", "smollm2-135m-int8-xeon-amx-2"]
    env = make_vector(
        "SpecDepth-v0", 32, trace=str(traces["tree"].folder), clock=tables, max_new_tokens=20, **sizes(plans["tree"])
    )
    env.reset(seed=0)
    assert set(env.under_way.clock) == {0, 1}
    *_, infos = env.step(np.zeros(32, int))
    slow = env.under_way.clock == 0  # the table may change where a text ends, which none does after one cycle
    assert infos["seconds"]["verify"][slow].min() > infos["seconds"]["verify"][~slow].max()


def test_unsupported_keywords_are_refused(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    tree, chain = str(traces["tree"].folder), str(traces["chain"].folder)
    for match, env_id, keywords in (
        ("give trace=FOLDER", "SpecDepth-v0", {}),
        ("those of a profile", "SpecK-v0", {"trace": "qwen2.5-coder-32b-cpu"}),
        ("has chains, which do not replay SpecDepth-v0", "SpecDepth-v0", {"trace": chain}),
        ("adjustment_interval", "SpecK-v0", {"trace": chain, "adjustment_interval": 8, "k_max": 6}),
        ("render_mode has no effect", "SpecDepth-v0", {"trace": tree, "render_mode": "ansi", **sizes(plans["tree"])}),
        ('needs episode="cycle"', "SpecDepth-v0", {"trace": tree, "reward": "ltd"}),
        ("were recorded to 24", "SpecDepth-v0", {"trace": tree, "max_new_tokens": 99, **sizes(plans["tree"])}),
    ):
        with pytest.raises(ValueError, match=match):
            ReplayVectorEnv(env_id, 2, **{"max_new_tokens": 20, **keywords})  # type: ignore[arg-type]
    for wrong in (0, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match="num_envs is"):
            make_vector("SpecDepth-v0", wrong, trace=tree, max_new_tokens=20, **sizes(plans["tree"]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="did you mean 'budget'"):
        make_vector("SpecDepth-v0", 2, trace=tree, bugdet=3)
    env = make_vector("SpecDepth-v0", 2, trace=tree, max_new_tokens=20, **sizes(plans["tree"]))
    with pytest.raises(ValueError, match="expected 2 indices"):
        env.reset(options={"texts": [0, 99]})


def test_actions_must_be_whole_numbers(traces: dict[str, Trace], plans: dict[str, Plan]) -> None:
    env = make_vector("SpecDepth-v0", 2, trace=str(traces["tree"].folder), max_new_tokens=20, **sizes(plans["tree"]))
    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        env.step(np.array([0, 1]))
    env.reset(seed=0)
    wrong = (
        [0, 2],
        [-1, 0],
        [0.9, 1.0],
        [0.0, 1.0],
        ["0", "1"],
        [True, False],
        [None, 1],
        [0],
        [0, 1, 1],
        [[0, 1]],
        1,
        [],
    )
    for actions in (*wrong, *(np.array(a) for a in wrong), np.array([0, 1], np.float32)):
        with pytest.raises(ValueError, match="actions are not 2 of Discrete"):
            env.step(actions)  # type: ignore[arg-type]
    for dtype in (np.int8, np.uint64, np.int64):
        env.step(np.array([0, 1], dtype))
    env.step([0, 1])


def test_replaying_trees_loads_no_model(
    traces: dict[str, Trace],
    plans: dict[str, Plan],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Replaying trees reads neither weights nor a tokenizer."""

    def refuse(*args: Any, **keywords: Any) -> None:
        raise AssertionError("a model was asked for")

    for name in ("loading.load_target", "loading.load_tokenizer", "drafters.loaders.load_weights"):
        monkeypatch.setattr(f"spec_envs.decoding.{name}", refuse)
    env = make_vector("SpecDepth-v0", 4, trace=str(traces["tree"].folder), max_new_tokens=20, **sizes(plans["tree"]))
    env.reset(seed=0)
    env.step(np.ones(4, int))
    assert env.forwards == 0  # all have expanded, and nothing is verified
    env.step(np.zeros(4, int))
    assert env.forwards == 4
