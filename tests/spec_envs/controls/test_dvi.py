"""SpecDVI-v0: observations, rewards, verification of drafted tokens, and exits in other environments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from spec_envs import agents
from spec_envs.agents.exits.policy import ExitPolicy
from spec_envs.controls import make_control
from spec_envs.decoding.exits.adapter import ExitAdapter
from spec_envs.decoding.exits.files import save_exit
from spec_envs.decoding.loading import load_decoder
from spec_envs.env import EndedText
from tests.support.texts import plain_text

EXIT = {"exit_layer": 3}


def make(tiny: dict, **keywords: Any) -> gym.Env:
    return gym.make("SpecDVI-v0", **{**tiny, "drafter": "auto", **EXIT, "prompts": "mt_bench", **keywords})


@pytest.mark.parametrize("block", [1, 3])
def test_reward_counts_accepted_tokens(block: int, tiny: dict) -> None:
    """The agent drafts a random mix of the target's tokens and others; each token before the first wrong one is
    rewarded, and the target's correction is emitted."""
    env = make(tiny, block=block, max_new_tokens=40)
    rng, paid = np.random.default_rng(0), 0
    for seed in range(6):
        env.reset(seed=seed)
        decoder = env.unwrapped.decoder
        text, done = plain_text(env.unwrapped.decoder.plain(), decoder.prompt, 40), False
        while not done:
            drafted, right, reward, info = [], [], 0.0, {}
            start = len(decoder.tokens)
            while not done and not info.get("emitted"):
                assert reward == 0 and info.get("positions", []) == []
                place = start + len(drafted)
                truth = text[place] if place < len(text) else 5
                right.append(bool(rng.random() < 0.7))
                drafted.append(truth if right[-1] else (truth + 1) % 16)
                _, reward, done, _, info = env.step(drafted[-1])
            assert len(drafted) == block
            accepted = right.index(False) if False in right else block
            # tokens after the end of the text are neither rewarded nor reported
            inside = min(accepted, len(text) - start)
            assert reward == inside == info["accepted"]
            verified = min(accepted + 1, block) if len(text) - start > accepted else inside
            assert [p["token"] for p in info["positions"]] == drafted[:verified]
            assert [p["accepted"] for p in info["positions"]] == right[:verified]
            paid += inside
        assert decoder.tokens == text
    assert paid > 30


def test_confidence_is_target_probability(tiny: dict) -> None:
    env = make(tiny, block=3, max_new_tokens=30)
    env.reset(seed=0)
    decoder = env.unwrapped.decoder
    text = decoder.prompt + decoder.tokens
    for token in (3, 4, 5):
        info = env.step(token)[4]
    target = decoder.local.target
    ids = torch.tensor([[*text, 3, 4, 5]])
    hidden, _ = target.forward(target.embed(ids), target.cache(64), torch.arange(ids.shape[1])[None])
    expected = target.head(hidden)[0, len(text) - 1 :].softmax(-1)
    for i, position in enumerate(info["positions"]):
        assert position["confidence"] == pytest.approx(float(expected[i, position["token"]]), abs=1e-5)


def test_sampling_accepts_with_target_probability(tiny: dict) -> None:
    """A fixed draft is accepted with the target's own probability of it, and the emitted tokens are distributed as
    p."""
    env = make(tiny, temperature=1.0, max_new_tokens=3)
    prompt = "the a of and in"
    counts, expected = np.zeros(16), np.zeros(16)
    accepted = chance = 0.0
    known: dict[int, np.ndarray] = {}  # the target's distribution after each first token
    for seed in range(1200):
        try:
            env.reset(seed=seed, options={"prompt": prompt})
        except EndedText:
            continue
        decoder = env.unwrapped.decoder
        if decoder.tokens[0] not in known:
            ids = torch.tensor([decoder.prompt + decoder.tokens])
            target = decoder.local.target
            hidden, _ = target.forward(target.embed(ids), target.cache(64), torch.arange(ids.shape[1])[None])
            known[decoder.tokens[0]] = target.head(hidden)[0, -1].softmax(-1).numpy()
        p = known[decoder.tokens[0]]
        draft = int(p.argsort()[-2])  # always the second most probable token
        accepted += env.step(draft)[4]["accepted"] > 0
        chance += p[draft]
        counts[decoder.tokens[1]] += 1
        expected += p
    draws = counts.sum()
    deviation = (expected * (1 - expected / draws)) ** 0.5
    assert abs(accepted - chance) < 4 * (draws * 0.25) ** 0.5 and 0.1 < chance / draws < 0.5
    assert (abs(counts - expected) < 4 * deviation + 1).all()


def test_block_ends_early_below_stop_probability(tiny: dict) -> None:
    env = make(tiny, block=6, stop=0.4, max_new_tokens=60)
    observation, _ = env.reset(seed=0)
    adapter = env.unwrapped.decoder.drafter.adapter
    lengths, done, drafted = set(), False, 0
    while not done:
        p = adapter.logits(torch.from_numpy(observation)[None])[0].detach().softmax(-1)
        observation, _, done, _, info = env.step(int(p.argmax()))
        drafted += 1
        assert bool(info["emitted"]) == (float(p.max()) < 0.4 or drafted == 6)
        if info["emitted"]:
            lengths.add(drafted)
            drafted = 0
    assert len(lengths) > 1


def test_policy_observation_is_the_exits_own(tiny: dict) -> None:
    env = make(tiny, observation="policy", block=4, max_new_tokens=40)
    observation, _ = env.reset(seed=0)
    control, adapter = env.unwrapped.control, env.unwrapped.decoder.drafter.adapter
    hidden = torch.from_numpy(observation[control.slices["hidden"]])[None]
    p = adapter.logits(hidden)[0].softmax(-1).detach().numpy()
    seen = {name: float(observation[s.start]) for name, s in control.slices.items()}
    assert seen["probability"] == pytest.approx(p.max(), abs=1e-5)
    assert seen["entropy"] == pytest.approx(-(p * np.log(p)).sum() / 10, abs=1e-5)
    assert seen["drafted"] == 0
    observation, *_ = env.step(4)
    assert observation[control.slices["drafted"]] == 0.25


def test_saved_exit_drafts_in_other_environments(tiny: dict, tmp_path: Path) -> None:
    env = make(tiny)
    adapter = env.unwrapped.decoder.drafter.adapter
    assert adapter is not make(tiny).unwrapped.decoder.drafter.adapter  # each decoder has its own adapter
    save_exit(adapter, tmp_path)
    chosen = {**tiny, "drafter": str(tmp_path)}
    for env_id, drafter, own in (
        ("SpecK-v0", str(tmp_path), {}),
        ("SpecK-v0", f"lookup+{tmp_path}", {"decision": "token"}),
        ("SpecK-v0", str(tmp_path), {"temperature": 1.0}),
        ("SpecDepth-v0", str(tmp_path), {"width": 1, "max_depth": 4}),
        ("SpecDVI-v0", str(tmp_path), EXIT),
    ):
        env = gym.make(env_id, **{**chosen, "drafter": drafter}, **own)
        env.reset(seed=0)
        done, rng = False, np.random.default_rng(0)
        while not done:
            done = env.step(int(rng.integers(min(4, env.action_space.n))))[2]
        if not own.get("temperature"):
            text = plain_text(env.unwrapped.decoder.plain(), env.unwrapped.decoder.prompt, tiny["max_new_tokens"])
            assert env.unwrapped.decoder.tokens == text
    with pytest.raises(ValueError, match=r"exit_layer is 2, but the exit .* has 3; pass exit_layer=3"):
        gym.make("SpecDVI-v0", **chosen, exit_layer=2)
    with pytest.raises(ValueError, match="a network"):
        gym.make("SpecTopK-v0", **chosen)


def test_stable_baselines_policy_starts_as_exit_projection(tiny: dict, tmp_path: Path) -> None:
    env = make(tiny, max_new_tokens=30)
    shared = {"target": tiny["target"], "exit_device": "cpu", "dtype": "float32", **EXIT}
    model = PPO(ExitPolicy, env, n_steps=32, batch_size=16, n_epochs=2, policy_kwargs=shared, device="cpu")
    observation, _ = env.reset(seed=0)
    adapter = ExitAdapter.fresh(env.unwrapped.decoder.local.target, tiny["target"], 3)
    expected = adapter.logits(torch.from_numpy(observation)[None])
    got = model.policy.get_distribution(torch.from_numpy(observation)[None]).distribution.logits
    torch.testing.assert_close(got, expected.log_softmax(-1), rtol=1e-3, atol=1e-3)
    before = {name: p.clone() for name, p in model.policy.adapter.named_parameters()}
    model.learn(64)
    assert any(not torch.equal(p, before[name]) for name, p in model.policy.adapter.named_parameters())
    save_exit(model.policy.adapter, tmp_path)
    load_decoder(tiny["target"], str(tmp_path), "cpu", "float32", width=1)

    control = make_control("dvi", {**tiny, **EXIT})
    agent = agents.AGENTS["ppo"](control=control, seed=0, n_steps=32, batch_size=16)
    assert agent.predict(observation, deterministic=True)[0] == int(expected.argmax())
    with pytest.raises(ValueError, match="dqn has no policy that starts as an exit's projection; take ppo"):
        agents.AGENTS["dqn"](control=control)
    with pytest.raises(ValueError, match="adapter is 'layers', expected \"head\""):
        agents.AGENTS["ppo"](control=make_control("dvi", {**tiny, **EXIT, "adapter": "layers"}))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"exit_layer": 8}, "exit_layer is 8; expected 1 to 7, of 8 layers"),
        ({"exit_layer": 0}, "exit_layer is 0; expected 1 to 7"),
        ({"block": 0}, "block is 0; expected 1 to 4096 drafted tokens"),
        ({"adapter": "lora"}, "adapter is 'lora'; expected one of head, kangaroo, layers"),
        ({"rank": 0}, "rank is 0; expected 1 to 32"),
        ({"stop": 1.5}, "stop is 1.5; expected a probability"),
        ({"draft_temperature": -1.0}, "draft_temperature is -1.0; expected 0"),
        ({"drafter": "lookup"}, "SpecDVI-v0 drafts from the target's own exit"),
        ({"reward": "ltd"}, "reward is 'ltd'; expected one of accepted, saved"),
        ({"trace": "qwen2.5-coder-32b-cpu"}, "no trace replays SpecDVI-v0"),
    ],
)
def test_invalid_keywords_are_refused(keywords: dict, message: str, tiny: dict) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(tiny, **keywords)


def test_misspelt_keyword_names_the_nearest(tiny: dict) -> None:
    with pytest.raises(
        TypeError, match=r"SpecDVI-v0 got an unexpected keyword argument 'exit_layers' \(did you mean 'exit_layer'"
    ):
        make(tiny, exit_layers=3)
