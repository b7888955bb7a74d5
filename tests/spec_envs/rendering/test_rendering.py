"""Pictures and coloured texts of every problem and engine, while a cycle is under way and after it."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import RenderCollection

from spec_envs import ENVIRONMENTS
from spec_envs.decoding.traces.trace import Trace
from spec_envs.decoding.tree import Tree
from spec_envs.env import SpecEnv
from spec_envs.rendering.view import State, ended, under_way
from tests.support.recordings import sizes
from tests.support.rollouts import drafter_of, rollout

IDS = list(ENVIRONMENTS)
SHAPE = (480, 800, 3)


def opened(env_id: str, tiny: dict[str, Any], **keywords: Any) -> SpecEnv:
    """Return an environment of the tiny models that draws pictures, in its first text."""
    shared = {**tiny, **drafter_of(env_id, tiny), "render_mode": "rgb_array"}
    env: Any = gym.make(env_id, **(shared | keywords)).unwrapped
    env.reset(seed=0)
    return env


def test_picture_shows_the_cycle_under_way_and_what_became_of_it(tiny: dict[str, Any]) -> None:
    env = opened("SpecTree-v0", tiny, max_new_tokens=200)
    first = env.render()
    env.step(0)
    grown = env.render()
    drafted = under_way(env.decoder)
    *_, info = env.step(3)  # seven nodes
    after = env.render()
    for picture in (first, grown, after):
        assert isinstance(picture, np.ndarray) and picture.shape == SHAPE and picture.dtype == np.uint8
    assert not np.array_equal(first, grown) and not np.array_equal(grown, after)
    assert set(drafted.states) == {State.DRAFTED} and len(drafted.tokens) == 110
    cycle = env.decoder.cycles[-1]
    view = ended(env.decoder, cycle)
    counts = {state: view.states.count(state) for state in State}
    assert np.array_equal(view.tokens, drafted.tokens)
    assert counts[State.ACCEPTED] == cycle.accepted == info["accepted"]
    assert counts[State.ACCEPTED] + counts[State.REJECTED] == cycle.verified == 7
    assert counts[State.LEFT_OUT] == 103
    assert view.tokens[view.path].tolist() == cycle.tokens[: cycle.accepted] and view.own == cycle.tokens[-1]
    assert np.array_equal(env.picture(cycle), after) and not np.array_equal(env.picture(None), after)


def test_last_picture_of_a_text_shows_its_last_cycle(tiny: dict[str, Any]) -> None:
    env = opened("SpecDepth-v0", tiny, max_new_tokens=5)
    while not env.step(0)[2]:
        pass
    assert np.array_equal(env.render(), env.picture(env.decoder.cycles[-1]))


@pytest.mark.parametrize(
    ("env_id", "keywords"),
    [
        *((env_id, {}) for env_id in IDS),
        ("SpecDepth-v0", {"episode": "cycle"}),
        ("SpecTree-v0", {"max_depth": 12, "width": 4}),
        ("SpecTree-v0", {"budgets": [0, 200]}),
        ("SpecTree-v0", {"drafter": "suffix"}),
        ("SpecK-v0", {"drafter": "lookup", "k_max": 64}),
        ("SpecK-v0", {"drafter": "lookup", "decision": "token"}),
        ("SpecK-v0", {"drafter": "lookup", "adjustment_interval": 8}),
        ("SpecDVI-v0", {"block": 4}),
        ("SpecTopK-v0", {"actions": "joint"}),
    ],
)
def test_every_problem_is_shown_in_every_mode(
    env_id: str, keywords: dict[str, Any], tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for mode in ("rgb_array", "ansi", "human"):
        env = opened(env_id, tiny, **keywords, render_mode=mode)
        done, rng = False, np.random.default_rng(0)
        for _ in range(8):
            shown = env.render()
            if mode == "rgb_array":
                assert isinstance(shown, np.ndarray) and shown.shape == SHAPE and shown.std() > 0
            else:
                assert (shown if mode == "ansi" else capsys.readouterr().out).count("-- ")
            done = env.step(int(rng.integers(env.action_space.n)))[2]
            if done:
                env.reset()


def test_unverified_tokens_are_shown_as_drafted(tiny: dict[str, Any], tiny_draft: Any) -> None:
    keywords = {"actions": "joint", "edge_value": 0.5, "drafter": str(tiny_draft)}
    env = opened("SpecTopK-v0", tiny, **keywords)
    env.step(env.action_space.n - 1)  # the drafter's own tokens
    cycle = env.decoder.cycles[-1]
    view = ended(env.decoder, cycle)
    assert cycle.unverified and set(view.states) == {State.DRAFTED} and view.own is None
    assert view.tokens.tolist()[: cycle.emitted] == cycle.tokens
    env.render()


@pytest.mark.parametrize(("env_id", "name"), [("SpecTree-v0", "tree"), ("SpecK-v0", "chain"), ("SpecK-v0", "lookup")])
def test_recordings_are_shown(env_id: str, name: str, traces: dict[str, Trace], plans: dict[str, Any]) -> None:
    trace = {"trace": str(traces[name].folder), **sizes(plans[name]), "max_new_tokens": 20}
    env: Any = gym.make(env_id, **trace, render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    for _ in range(6):
        assert env.render().shape == SHAPE
        if env.step(2)[2]:
            env.reset()


@pytest.mark.parametrize(
    ("env_id", "trace"), [("SpecK-v0", "qwen2.5-coder-32b-cpu"), ("SpecTopK-v0", "smollm2-135m-topk")]
)
def test_shipped_recordings_are_shown(env_id: str, trace: str) -> None:
    env: Any = gym.make(env_id, trace=trace, render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    for action in (3, 5, 4):
        env.step(action)
        assert env.render().shape == SHAPE


def test_engine_without_tokens_of_its_drafts_is_shown(tiny: dict[str, Any]) -> None:
    """A server reports how many tokens it drafted, and has no tree."""
    env = opened("SpecK-v0", tiny, drafter="lookup")
    env.step(3)
    cycle = dataclasses.replace(env.decoder.cycles[-1], drafted=40, verified=40)
    env.decoder.cycles[-1] = cycle
    assert not len(ended(env.decoder, cycle).tokens)
    assert env.render().shape == SHAPE  # type: ignore[union-attr]


def test_nothing_is_kept_without_a_render_mode(tiny: dict[str, Any]) -> None:
    for env_id in IDS:
        env: Any = gym.make(env_id, **{**tiny, **drafter_of(env_id, tiny)}).unwrapped
        assert type(env.decoder.tree) is Tree


def test_pictures_change_no_rollout(tiny: dict[str, Any]) -> None:
    for env_id in ("SpecTree-v0", "SpecDepth-v0"):
        plain = gym.make(env_id, **tiny)
        drawn = gym.make(env_id, **tiny, render_mode="rgb_array")
        assert rollout(plain, 1, 20) == rollout(drawn, 1, 20)


def test_gymnasium_collects_a_picture_of_every_step(tiny: dict[str, Any]) -> None:
    env = RenderCollection(gym.make("SpecDepth-v0", **tiny, render_mode="rgb_array"))
    env.reset(seed=0)
    for _ in range(3):
        env.step(0)
    frames: Any = env.render()
    assert len(frames) == 4 and all(frame.shape == SHAPE for frame in frames)
    assert env.metadata["render_fps"] == 2
