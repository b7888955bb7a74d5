"""``generate`` and the environment use one control: same actions, same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO

from spec_envs import ENVIRONMENTS, generate
from spec_envs.agents import AGENTS
from spec_envs.controls import Policy, make_control
from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.loading import load_decoder
from spec_envs.prompts.sets import encode
from tests.support.models.tiny import CPU
from tests.support.rollouts import drafter_of


def run_episode(env: gym.Env, agent: Any, text: str, seed: int) -> tuple[list[int], list[int]]:
    """Return the actions of an agent in an episode, and the tokens."""
    observation, _ = env.reset(seed=seed, options={"prompt": text})
    actions, state, done, start = [], None, False, True
    while not done:
        action, state = agent.predict(observation, state, np.array([start]), deterministic=True)
        observation, _, done, _, _ = env.step(int(action))
        actions.append(int(action))
        start = False
    return actions, env.unwrapped.decoder.tokens


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        *(
            (env_id, name)
            for env_id in ENVIRONMENTS
            for name in ("ppo", "qrdqn", "recurrent-ppo")
            if "DVI" not in env_id
        ),
        ("SpecDVI-v0", "ppo"),  # the others have no policy that starts as an exit's projection
    ],
)
def test_generate_equals_environment(env_id: str, name: str, tiny: dict, tiny_draft: Path) -> None:
    chosen = tiny | drafter_of(env_id, tiny) | ({"drafter": str(tiny_draft)} if env_id == "SpecTopK-v0" else {})
    env = gym.make(env_id, **chosen)
    control = make_control(env_id, chosen)
    models = {part: chosen[part] for part in ("target", "drafter", "device", "dtype")}
    decoder = control.open(WallClock(CPU), **models)
    different = set()
    for seed in range(4):
        agent = AGENTS[name](control=control, seed=seed, pi_arch=[32], vf_arch=[8])
        for text in ("the a of and in", "def we is you you it", "to to to"):
            done = generate(decoder, control, agent, encode(env.unwrapped.prompts.tokenizer, text), 24, seed).run()
            assert (done.actions, done.tokens) == run_episode(env, agent, text, seed)
            different |= set(done.actions)
    assert len(different) > 1


def test_generate_equals_environment_when_sampling(tiny: dict) -> None:
    env = gym.make("SpecBudget-v0", **tiny, temperature=1.0)
    control = make_control("budget", {})
    decoder = load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32", temperature=1.0)
    agent = AGENTS["ppo"](control=control, seed=0)
    done = generate(decoder, control, agent, encode(env.unwrapped.prompts.tokenizer, "the a"), 24, 5).run()
    assert (done.actions, done.tokens) == run_episode(env, agent, "the a", 5)


def test_stream_yields_tokens_of_each_cycle(tiny: dict) -> None:
    control = make_control("depth", {})
    decoder = load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32")
    agent = AGENTS["fixed"](control=control, value=3)
    generation = generate(decoder, control, agent, [3, 4, 5], 40)
    streamed = [list(tokens) for tokens in generation]
    assert [token for tokens in streamed for token in tokens] == generation.tokens and len(streamed[0]) == 1
    assert [len(tokens) for tokens in streamed[1:]] == [c.emitted for c in generation.cycles]
    assert generation.seconds > 0 and generation.tokens_per_second > 0 and generation.prefill_seconds > 0


def test_partner_decides_the_rest_and_is_charged(tiny: dict) -> None:
    depth, budget = make_control("depth", {}), make_control("budget", {})
    fixed_budget = AGENTS["fixed"](control=budget, value=15)
    fixed_depth = AGENTS["fixed"](control=depth, value=3)
    fixed_budget.decision_seconds = fixed_depth.decision_seconds = 0.25

    env = gym.make("SpecDepth-v0", **tiny)
    env.unwrapped.control.partner = Policy(budget, fixed_budget)
    env.reset(seed=0)
    info = env.step(0)[4]
    assert info["verified"] == 15 and info["seconds"]["policy"] == 0.25

    env = gym.make("SpecBudget-v0", **tiny)
    env.unwrapped.control.partner = Policy(depth, fixed_depth)
    env.reset(seed=0)
    info = env.step(0)[4]
    assert info["drafted"] == 310 and info["seconds"]["policy"] == 0.75


def test_plain_generation(tiny: dict) -> None:
    decoder = load_decoder(tiny["target"], None, "cpu", "float32")
    done = generate(decoder, None, None, [3, 4, 5], 12).run()
    assert len(done.tokens) == 12 and {c.verified for c in done.cycles} == {0}


def test_agent_of_another_problem_is_refused(tiny: dict[str, Any]) -> None:
    """The layout of an observation counts, not only its size, and so does the number of actions."""
    token, cycle = make_control("k", {"decision": "token"}), make_control("k", {})
    decoder = load_decoder(tiny["target"], "lookup", "cpu", "float32", width=1, max_depth=15)
    agent = AGENTS["ppo"](control=token)
    with pytest.raises(
        ValueError, match=r"PPOAgent was made for SpecK-v0 with an observation of drafted.*, but here SpecK-v0 has conf"
    ):
        Policy(cycle, agent)
    with pytest.raises(ValueError, match="was made for SpecK-v0 with an observation of"):
        generate(decoder, cycle, agent, [2, 3, 4], 12)
    fewer = make_control("k", {"k_max": 8})
    with pytest.raises(
        ValueError, match=r"was made for SpecK-v0 with actions Discrete\(9\), but here SpecK-v0 has Discrete\(17\)"
    ):
        Policy(cycle, AGENTS["fixed"](control=fewer, value=2))
    same_size = make_control("depth", {"width": 2, "max_depth": 4}), make_control("depth", {"width": 3, "max_depth": 3})
    assert same_size[0].observation_space.shape == same_size[1].observation_space.shape
    with pytest.raises(ValueError, match=r"frontier\[2\]"):
        Policy(same_size[1], AGENTS["random"](control=same_size[0]))


@pytest.mark.parametrize("action", [1.5, "1", True, np.array([1]), None])
def test_invalid_predictions_and_decision_seconds_are_refused(action: Any, tiny: dict[str, Any]) -> None:
    class Wrong:
        decision_seconds = 0.0

        def predict(self, observation: np.ndarray, *_: Any, **__: Any) -> tuple[Any, None]:
            return action, None

    control = make_control("k", {})
    decoder = load_decoder(tiny["target"], "lookup", "cpu", "float32", width=1, max_depth=15)
    with pytest.raises(ValueError, match=r"is not in Discrete\(17\)"):
        generate(decoder, control, Wrong(), [2, 3, 4], 12).run()
    wrong: Any = Wrong()
    for seconds in (float("nan"), -1.0, "1", None):
        wrong.decision_seconds = seconds
        with pytest.raises(ValueError, match="decision_seconds is"):
            Policy(control, wrong)


def test_model_of_stable_baselines3_decodes(tiny: dict[str, Any]) -> None:
    """Its decisions are charged no seconds."""
    env = gym.make("SpecDepth-v0", **tiny)
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=8, gamma=1.0, device="cpu")
    control = make_control("depth", {})
    decoder = control.open(WallClock(CPU), **{part: tiny[part] for part in ("target", "drafter", "device", "dtype")})
    prompt = encode(env.unwrapped.prompts.tokenizer, "the a of")
    done = generate(decoder, control, model, prompt, 24, 5).run()
    assert (done.actions, done.tokens) == run_episode(env, model, "the a of", 5)
    assert {cycle.seconds["policy"] for cycle in done.cycles} == {0.0}


def test_wrong_arguments_are_refused_in_one_sentence(tiny: dict[str, Any]) -> None:
    control = make_control("depth", {})
    decoder: Any = control.open(**{part: tiny[part] for part in ("target", "drafter", "device", "dtype")})
    agent: Any = AGENTS["fixed"](control=control, value=3)
    for prompt in ("a text", ["a", "text"], [1.5], [[2, 3]], {"input_ids": [2, 3]}, 5, None):
        for call in (
            lambda wrong=prompt: generate(decoder, control, agent, wrong),
            lambda wrong=prompt: decoder.start(wrong, 12, np.random.default_rng(0)),
        ):
            with pytest.raises(TypeError, match=r"the prompt is .*; expected token ids, such as spec_envs.prompts"):
                call()
    with pytest.raises(TypeError, match="there is an agent, but control is None; give both, or None for both"):
        generate(decoder, None, agent, [2, 3])
    with pytest.raises(TypeError, match="there is a control, but agent is None; give both, or None for both"):
        generate(decoder, control, None, [2, 3])
    wrong: Any
    for wrong in ("ppo", AGENTS["ppo"], print):
        with pytest.raises(TypeError, match=r"agent is .*; expected one of agents.load"):
            generate(decoder, control, wrong, [2, 3])
    wrong = gym.make("SpecDepth-v0", **tiny)
    with pytest.raises(TypeError, match=r"control is .*; expected a Control, which an environment has"):
        generate(decoder, wrong, agent, [2, 3])
    assert generate(decoder, control, agent, np.array([2, 3]), 8).run().tokens  # type: ignore[arg-type]
