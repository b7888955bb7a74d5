"""Every registered environment: checkers, determinism, keywords, documentation, rendering."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3

from spec_envs import ENVIRONMENTS
from spec_envs.controls import CONTROLS
from spec_envs.decoding.drafters.names import static_over_plain
from spec_envs.env import SpecEnv
from spec_envs.environments import HEADINGS, page
from tests.support.models.tiny import REAL
from tests.support.rollouts import drafter_of, rollout

IDS = list(ENVIRONMENTS)
LTD: dict[str, Any] = {"observation": "ltd", "reward": "ltd", "episode": "cycle"}


def variants(*keywords: dict) -> list[tuple[str, dict]]:
    """Return every environment id with each of the keyword arguments whose observation it offers."""
    offered = {env_id: CONTROLS[env_id].observations for env_id in IDS}
    return [(i, k) for i in IDS for k in keywords if k.get("observation", "default") in offered[i]]


def make(env_id: str, tiny: dict, **keywords: Any) -> gym.Env:
    return gym.make(env_id, **{**tiny, **drafter_of(env_id, tiny), **keywords})


@pytest.mark.parametrize(("env_id", "keywords"), variants({}, LTD, {"cost_features": True}, {"observation": "policy"}))
def test_checkers_pass_without_warnings(env_id: str, keywords: dict, tiny: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(env_id, tiny, **keywords).unwrapped, skip_render_check=True)
        check_env_sb3(make(env_id, tiny, **keywords).unwrapped)


@pytest.mark.parametrize(("env_id", "keywords"), variants({}, LTD, {"temperature": 1.0, "top_p": 0.9}))
def test_rollouts_on_priced_clock_are_reproducible(env_id: str, keywords: dict, tiny: dict) -> None:
    first, second = (rollout(make(env_id, tiny, **keywords), 7, 60) for _ in range(2))
    assert first == second
    assert first != rollout(make(env_id, tiny, **keywords), 8, 60)


def test_random_depths_are_seeded(tiny: dict) -> None:
    first, second = (rollout(make("SpecBudget-v0", tiny, depth="random"), 3, 40) for _ in range(2))
    assert first == second
    depths = {round(step[0][0][25] * 12) for step in first[2:] if isinstance(step[0], list) and len(step[0]) == 4}
    assert len(depths) > 3


@pytest.mark.parametrize("env_id", IDS)
def test_every_action_can_be_stepped(env_id: str, tiny: dict) -> None:
    env = make(env_id, tiny)
    for action in range(env.action_space.n):
        observation, _ = env.reset(seed=action)
        assert env.observation_space.contains(observation)
        observation, reward, _terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        assert np.isfinite(reward) and not truncated
        assert set(info) >= {"emitted", "accepted", "drafted", "verified", "bytes_up", "bytes_down", "seconds", "saved"}
    with pytest.raises(ValueError, match="is not in Discrete"):
        env.unwrapped.step(env.action_space.n)


@pytest.mark.parametrize("env_id", IDS)
def test_rewards_of_an_episode_are_tokens_minus_time(env_id: str, tiny: dict) -> None:
    env = make(env_id, tiny, pace=20.0, reward="saved")
    for seed in range(5):
        env.reset(seed=seed)
        total, tokens, seconds, done = 0.0, 0, 0.0, False
        while not done:
            _, reward, done, _, info = env.step(env.action_space.sample())
            total += float(reward)
            tokens += info["emitted"]
            seconds += sum(info["seconds"].values())
        decoder = env.unwrapped.decoder
        assert tokens == len(decoder.tokens) - 1 == info["tokens"] - 1
        assert total == pytest.approx(tokens - 20.0 * seconds)
        assert info["speedup"] == pytest.approx(tokens / seconds * 0.0496)
        assert info["task"] == env.unwrapped.prompt.task and isinstance(info["text"], str)


def test_root_forward_is_charged_to_its_own_cycle(tiny: dict) -> None:
    """A step of a whole cycle costs the root, the expansions and the verification of that cycle."""
    env = make("SpecBudget-v0", tiny, depth=3, max_new_tokens=200)
    table = env.unwrapped.decoder.clock.table
    env.reset(seed=0)
    for _ in range(3):
        _, _, done, _, info = env.step(2)
        assert info["seconds"]["draft"] == pytest.approx(table.seconds("draft", 1) + 3 * table.seconds("draft", 10))
        assert info["seconds"]["verify"] == pytest.approx(table.seconds("verify", 12))
        assert not done


def test_actions_of_depth(tiny: dict) -> None:
    env = make("SpecDepth-v0", tiny, max_depth=4, budget=8, max_new_tokens=200)
    env.reset(seed=0)
    infos = [env.step(1)[4] for _ in range(3)]
    # the first level was drafted before the first action
    assert [i["emitted"] > 0 for i in infos] == [False, False, True]
    assert infos[2]["drafted"] == 410 and infos[2]["verified"] == 8
    info = env.step(0)[4]
    assert info["drafted"] == 110


def test_ltd_rewards_cycles_and_continues_text_over_resets(tiny: dict) -> None:
    env = make("SpecDepth-v0", tiny, **LTD, policy_seconds=0.001)
    env.reset(seed=0)
    text: list[int] = []
    while True:
        done, seconds = False, 0.0
        while not done:
            _, reward, done, _, info = env.step(1)
            seconds += sum(info["seconds"].values())
            assert done or reward == 0.0
        assert reward == pytest.approx(info["emitted"] / (100 * seconds))
        assert env.unwrapped.decoder.tokens[: len(text)] == text
        text = list(env.unwrapped.decoder.tokens)
        if env.unwrapped.decoder.finished:
            break
        env.reset()
    env.reset()
    assert len(env.unwrapped.decoder.tokens) == 1


def test_published_observations(tiny: dict) -> None:
    depth, budget = make("SpecDepth-v0", tiny, **LTD), make("SpecBudget-v0", tiny, **LTD, budgets="ltd", depth=12)
    seen, _ = depth.reset(seed=0)
    decoder = depth.unwrapped.decoder
    assert seen.shape == (128,)
    assert np.allclose(seen[:100], decoder.tree.scores[10:])
    assert np.allclose(seen[100:114], decoder.length / 1000) and np.allclose(seen[114:], 0.1)
    seen, _ = budget.reset(seed=0)
    assert seen.shape == (1268,) and budget.action_space.n == 24
    assert np.allclose(seen[:1210], budget.unwrapped.decoder.tree.scores) and np.allclose(seen[1239:], 1.2)
    assert make("SpecBudget-v0", tiny, budgets="ltd-paper").action_space.n == 12


@pytest.mark.parametrize("env_id", IDS)
def test_documented_table_equals_observation(env_id: str, tiny: dict) -> None:
    kind = CONTROLS[env_id]
    number = r"(−?[\d.]+(?:e\d+)?)"
    rows = re.findall(rf"\| (\d+)(?:–(\d+))? \| `(\w+)`.*?\| {number} \| {number} \|", kind.__doc__ or "")
    documented = [(name, int(a), int(b or a) + 1, rounded(low), rounded(high)) for a, b, name, low, high in rows]
    control = kind(observation="policy") if "policy" in kind.observations else kind()
    actual = [
        (e.name, control.slices[e.name].start, control.slices[e.name].stop, rounded(e.low), rounded(e.high))
        for e in control.entries
    ]
    assert documented == actual
    assert re.findall(r"^## (.*)", page(kind), re.MULTILINE) == list(HEADINGS)


def rounded(number: str | float) -> float:
    """Return a number rounded as in a table."""
    return float(f"{float(str(number).replace('−', '-')):.2g}")


@pytest.mark.parametrize("env_id", IDS)
def test_observations_do_not_depend_on_time(env_id: str, tiny: dict) -> None:
    cheap = rollout(make(env_id, tiny), 1, 20)
    dear = rollout(make(env_id, tiny, pace=1.0, policy_seconds=0.5), 1, 20)
    assert list(map(observed, cheap)) == list(map(observed, dear))


def observed(step: Any) -> list:
    """Return the observation in an entry of a rollout, which is an observation, an info, or the result of a step or
    reset."""
    if isinstance(step, list):
        return step
    return [] if isinstance(step, dict) else [step[0][0]]


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (
            {"max_dept": 3},
            TypeError,
            "SpecDepth-v0 got an unexpected keyword argument 'max_dept' (did you mean 'max_depth'",
        ),
        ({"temprature": 1.0}, TypeError, "did you mean 'temperature'"),
        ({"reward": "ltd"}, ValueError, 'reward="ltd" needs episode="cycle"'),
        ({"reward": "tokens"}, ValueError, "reward is 'tokens'; expected one of saved, ltd"),
        ({"observation": "raw"}, ValueError, "observation is 'raw'; expected one of default, ltd"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0; expected 0"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0; expected"),
        ({"max_new_tokens": 1}, ValueError, "max_new_tokens is 1; expected 2"),
        ({"prompts": "gsm9k"}, ValueError, "no prompt set gsm9k; there are cnndm"),
        ({"split": "dev"}, ValueError, "split is 'dev'; expected one of train"),
        ({"clock": "sundial"}, ValueError, "no cost table 'sundial'"),
        ({"clock": "wall", "cost_features": True}, ValueError, "need cost tables"),
        ({"clock": []}, ValueError, "clock is an empty list"),
        ({"pace": float("nan")}, ValueError, "pace is nan; expected tokens per second"),
        ({"dtype": "float8"}, ValueError, "dtype 'float8' is unknown"),
        ({"device": "gpu"}, ValueError, "device 'gpu' cannot be used here"),
        ({"max_new_tokens": 10**6}, ValueError, "max_new_tokens is 1000000; the context is"),
        (
            {"target": "smollm", "drafter": "auto"},
            ValueError,
            "no drafter is known for 'smollm' (did you mean 'smollm2-135m'?), only for smollm2-135m",
        ),
        ({"drafter": "nowhere/at-all"}, ValueError, "no model 'nowhere/at-all'"),
    ],
)
def test_invalid_keywords_are_refused(keywords: dict, error: type[Exception], message: str, tiny: dict) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make("SpecDepth-v0", tiny, **keywords)


def test_draft_model_as_tree_of_width_one(tiny: dict, tiny_draft: Path) -> None:
    env = make("SpecDepth-v0", tiny | {"drafter": str(tiny_draft)}, width=1, max_depth=5)
    env.reset(seed=0)
    done, rng = False, np.random.default_rng(0)
    while not done:
        _, _, done, _, info = env.step(int(rng.integers(2)))
        assert info["verified"] <= 6
    with pytest.raises(
        ValueError, match="drafts a chain, not a tree of width 10; pass width=1, or take an EAGLE-3 head"
    ):
        make("SpecDepth-v0", tiny | {"drafter": str(tiny_draft)})
    with pytest.raises(ValueError, match=r"temperature is 1.0, at which the draft model .* draws its chain"):
        make("SpecBudget-v0", tiny | {"drafter": str(tiny_draft)}, width=1, temperature=1.0)


def test_static_over_plain_depends_on_the_pair() -> None:
    assert static_over_plain("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b") > 1
    assert static_over_plain("a/larger-one", "qwen2.5-coder-0.5b") == 1 == static_over_plain(REAL, "a/head")


def test_invalid_keywords_of_budget_are_refused(tiny: dict) -> None:
    with pytest.raises(ValueError, match="expected ascending numbers of nodes"):
        make("SpecBudget-v0", tiny, budgets=[8, 4])
    with pytest.raises(ValueError, match="depth is 13; expected a number from 0 to max_depth"):
        make("SpecBudget-v0", tiny, depth=13)


def test_one_of_several_clocks_is_drawn_per_episode(tiny: dict, tmp_path: Any) -> None:
    fast = tmp_path / "fast.json"
    fast.write_text('{"verify": {"1": 0.01, "64": 0.02}, "draft": {"10": 0.001}}')
    env = make("SpecDepth-v0", tiny, clock=["qwen3-14b-a6000", str(fast)], cost_features=True)
    costs = set()
    for seed in range(12):
        observation, _ = env.reset(seed=seed)
        costs.add(round(float(observation[-1]), 3))
    assert costs == {0.05, 0.1}


def test_prompt_option(tiny: dict) -> None:
    env = make("SpecDepth-v0", tiny)
    _, _ = env.reset(seed=0, options={"prompt": "the a of and"})
    assert env.unwrapped.decoder.prompt == env.unwrapped.prompts.tokenizer("the a of and .")["input_ids"]
    assert env.unwrapped.prompt.task == "given"


@pytest.mark.parametrize("options", [{"promt": "the a"}, {"prompt": ["the a"]}])
def test_invalid_options_are_refused(options: dict, tiny: dict) -> None:
    with pytest.raises(ValueError, match=r"expected \{'prompt': a text or a Prompt\}"):
        make("SpecDepth-v0", tiny).reset(seed=0, options=options)


def test_step_after_the_end_is_refused(tiny: dict) -> None:
    env = make("SpecBudget-v0", tiny)
    env.reset(seed=0)
    while not env.step(0)[2]:
        pass
    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        env.step(0)


@pytest.mark.parametrize("env_id", IDS)
def test_rendering_works_right_after_reset(env_id: str, tiny: dict) -> None:
    for mode in ("ansi", "rgb_array"):
        env = make(env_id, tiny, render_mode=mode)
        env.reset(seed=0)
        for _ in range(4):
            shown = env.render()
            assert isinstance(shown, str) if mode == "ansi" else (shown.shape == (480, 800, 3) and shown.std() > 0)
            if env.step(0)[2]:
                env.reset()
        env.close()
        env.close()


def test_human_rendering_prints(tiny: dict, capsys: pytest.CaptureFixture[str]) -> None:
    env = make("SpecDepth-v0", tiny, render_mode="human")
    env.reset(seed=0)
    env.step(0)
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize("env_id", IDS)
def test_specs_survive_serialisation(env_id: str, tiny: dict) -> None:
    env = make(env_id, tiny)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert rollout(env, 0, 10) == rollout(again, 0, 10)
    assert gym.make(f"spec_envs:{env_id}", **env.spec.kwargs).spec.nondeterministic


def test_measured_clock_is_refused_in_a_worker(tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    with pytest.raises(ValueError, match="disturbed by its siblings"):
        make("SpecDepth-v0", tiny, clock="wall")
    make("SpecDepth-v0", tiny)


def test_measured_seconds_are_positive(tiny: dict) -> None:
    env = make("SpecDepth-v0", tiny, clock="wall")
    env.reset(seed=0)
    info = env.step(0)[4]
    assert info["seconds"]["draft"] > 0 and info["seconds"]["verify"] > 0
    assert isinstance(env.unwrapped, SpecEnv) and env.unwrapped.pace == pytest.approx(env.unwrapped.plain_rate)
