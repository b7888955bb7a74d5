"""Environments as users of Gymnasium, and of libraries based on it, call them."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit

from spec_envs import ENVIRONMENTS
from spec_envs.controls import CONTROLS
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.decoding.traces.trace import Trace
from tests.support.rollouts import drafter_of

PROFILE: dict[str, Any] = {"trace": "qwen2.5-coder-32b-cpu", "max_new_tokens": 48}


@pytest.fixture
def make_env(traces: dict[str, Trace], portfolio: PortfolioTrace, tiny: dict[str, Any]) -> Callable[..., gym.Env]:
    """Return a function that makes an environment on a priced clock: on a trace if it replays one, else over tiny
    models."""

    def make(env_id: str, **more: Any) -> gym.Env:
        kind = CONTROLS[env_id]
        if kind.trace_kind in ("tree", "chain"):
            own = set(inspect.signature(kind).parameters)
            sizes = {name: size for name, size in {"max_depth": 4, "width": 4, "k_max": 6}.items() if name in own}
            trace = traces["copies" if kind.trace_kind == "chain" else "tree"]
            keywords = {"max_new_tokens": 20, "trace": str(trace.folder), **sizes}
        elif kind.trace_kind:
            sizes = {"sizes": (1, 2, 5), "depths": (0, 1, 2), "width": 3, "drafter": ",".join(portfolio.traces)}
            keywords = {"max_new_tokens": 20, "trace": str(portfolio.folder), **sizes}
        elif env_id == "SpecTopK-v0":
            keywords = {"max_new_tokens": 20, "trace": "smollm2-135m-topk"}
        else:
            keywords = tiny | drafter_of(env_id, tiny)
        return gym.make(env_id, **keywords | more)

    return make


def rollout(env: Any, seed: int | None, steps: int = 40) -> list[Any]:
    """Return everything that an environment returns under random actions."""
    rng = np.random.default_rng(0)
    returned: list[Any] = [env.reset(seed=seed)]
    for _ in range(steps):
        returned.append(env.step(int(rng.integers(env.action_space.n))))
        if returned[-1][2] or returned[-1][3]:
            returned.append(env.reset())
    return returned


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_check_env_passes(env_id: str, make_env: Callable[..., gym.Env]) -> None:
    """The spec is marked deterministic because the checker tests step determinism only then."""
    env = make_env(env_id).unwrapped
    assert env.spec is not None
    env.spec = copy.deepcopy(env.spec)
    env.spec.nondeterministic = False
    check_env(env, skip_render_check=True)


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_environments_are_deterministic(env_id: str, make_env: Callable[..., gym.Env]) -> None:
    first, second = rollout(make_env(env_id), 3), rollout(make_env(env_id), 3)
    assert all(data_equivalence(a, b, exact=True) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_reset_clears_all_state(env_id: str, make_env: Callable[..., gym.Env]) -> None:
    """The same environment returns exactly the same under the same seed, whatever ran before."""
    env = make_env(env_id)
    first = rollout(env, 3)
    rollout(env, 4, 60)
    assert data_equivalence(first, rollout(env, 3), exact=True)


def test_rollouts_on_profile_are_reproducible() -> None:
    for keywords in ({}, {"decision": "token"}, {"adjustment_interval": 8}):
        env = gym.make("SpecK-v0", **PROFILE, **keywords)
        first = rollout(env, 3)
        rollout(env, 4)
        assert data_equivalence(first, rollout(env, 3), exact=True)


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_copies_are_independent_and_equal(env_id: str, make_env: Callable[..., gym.Env]) -> None:
    env = make_env(env_id)
    first = rollout(env, 3)
    for other in (pickle.loads(pickle.dumps(env)), copy.deepcopy(env), pickle.loads(pickle.dumps(env.unwrapped))):
        assert other.unwrapped.decoder is not env.unwrapped.decoder  # type: ignore[attr-defined]
        assert data_equivalence(first, rollout(other, 3), exact=True)


def test_time_limit_and_statistics_wrappers(make_env: Callable[..., gym.Env]) -> None:
    cut: Any
    for cut in (make_env("SpecDepth-v0", max_episode_steps=3), TimeLimit(make_env("SpecDepth-v0"), 3)):
        env = RecordEpisodeStatistics(cut)
        env.reset(seed=0)
        steps = [env.step(1) for _ in range(3)]
        assert [step[3] for step in steps] == [False, False, True]
        assert steps[-1][4]["episode"]["l"] == 3
        assert steps[-1][4]["episode"]["r"] == pytest.approx(sum(float(step[1]) for step in steps))
        env.reset()
        env.step(0)


def test_actions_must_be_whole_numbers() -> None:
    env = gym.make("SpecK-v0", **PROFILE).unwrapped
    env.reset(seed=0)
    wrong = (
        2.9,
        2.0,
        np.float32(1.7),
        "3",
        True,
        np.True_,
        None,
        [1],
        (1,),
        np.array([1]),
        np.array(1.0),
        -1,
        17,
        10**30,
    )
    for action in (*wrong, float("nan"), {}, b"1"):
        with pytest.raises(ValueError, match=r"is not in Discrete\(17\); expected a whole number from 0 to 16"):
            env.step(action)  # type: ignore[arg-type]
    for right in (2, np.int64(2), np.uint8(2), np.uint64(2), np.array(2), np.array(2, np.int32)):
        env.reset(seed=0)
        assert env.step(right)[4]["drafted"] == 2  # type: ignore[arg-type]


def test_refused_reset_leaves_no_text(tiny: dict[str, Any], make_env: Callable[..., gym.Env]) -> None:
    live = gym.make("SpecDepth-v0", **tiny).unwrapped
    long = {"prompt": "the a of and " * 600}
    replayed = make_env("SpecDepth-v0", episode="cycle").unwrapped
    env: Any
    for env, wrong in (
        (live, {"options": {"promt": "the a"}}),
        (live, {"options": {"prompt": 5}}),
        (live, {"options": ["the a"]}),
        (live, {"options": "the a"}),
        (live, {"options": long}),
        (live, {"seed": -1}),
        (live, {"seed": 1.5}),
        (live, {"seed": "one"}),
        (live, {"seed": np.int64(3)}),
        (replayed, {"options": {"prompt": "the a"}}),
        (replayed, {"options": {"prompt": None, "texts": [1]}}),
    ):
        env.reset(seed=0)
        env.step(0)
        with pytest.raises((ValueError, gym.error.Error)):
            env.reset(**wrong)
        with pytest.raises(ValueError, match=r"no text to continue; call reset\(\) first"):
            env.step(0)
        with pytest.raises(ValueError, match=r"no text to show; call reset\(\) first"):
            env.render()
    live.reset(seed=2**70)
    live.step(0)


def test_refused_start_leaves_no_text(tiny_decoder: Decoder, rng: np.random.Generator) -> None:
    tiny_decoder.start([2, 3, 4], 20, rng)
    assert not tiny_decoder.finished
    for prompt, tokens in (([], 20), ([2] * 5000, 20), ([2, 3], 0)):
        with pytest.raises(ValueError, match=r"the prompt|max_new_tokens"):
            tiny_decoder.start(prompt, tokens, rng)
        with pytest.raises(RuntimeError, match=r"call start\(\)"):
            tiny_decoder.verify()


def test_closed_environment_refuses_calls(make_env: Callable[..., gym.Env]) -> None:
    env = make_env("SpecDepth-v0").unwrapped
    with pytest.raises(ValueError, match=r"no text to show; call reset\(\) first"):
        env.render()
    env.reset(seed=0)
    env.close()
    env.close()
    for call in (lambda: env.step(0), env.reset, env.render):
        with pytest.raises(ValueError, match="the environment is closed; make another one"):
            call()  # type: ignore[no-untyped-call]


def test_measured_clock_is_refused_in_a_ray_worker(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for mode, running, refused in ((1, True, True), (0, True, False), (1, False, False)):
        context = SimpleNamespace(worker=SimpleNamespace(mode=mode))
        ray = SimpleNamespace(
            WORKER_MODE=1, is_initialized=lambda on=running: on, get_runtime_context=lambda at=context: at
        )
        monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
        if refused:
            with pytest.raises(ValueError, match="disturbed by its siblings"):
                gym.make("SpecDepth-v0", **tiny | {"clock": "wall"})
        else:
            gym.make("SpecDepth-v0", **tiny | {"clock": "wall"})
        gym.make("SpecDepth-v0", **tiny)


def test_torchrl_wraps_environment() -> None:
    """TorchRL passes its own keyword to find out whether an environment accepts it, and parses Python's error."""
    from torchrl.envs import GymEnv
    from torchrl.envs.utils import check_env_specs

    env = GymEnv("SpecK-v0", **PROFILE, categorical_action_encoding=True)
    env.set_seed(0)
    check_env_specs(env)
    result = env.rollout(10)
    assert result["next", "reward"].isfinite().all() and len(result) > 2
    env.close()
