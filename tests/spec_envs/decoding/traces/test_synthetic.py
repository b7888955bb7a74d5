"""The synthetic profile gives the published counts, and is a whole environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.controls.k import KControl
from spec_envs.decoding.clock import PricedClock
from spec_envs.decoding.traces.synthetic import Profile
from spec_envs.experiments import train
from spec_envs.experiments.config import load_experiment
from spec_envs.files import DATA
from spec_envs.generation import generate

NAME = "qwen2.5-coder-32b-cpu"
PUBLISHED = {4: (0.8125, 10.40), 8: (0.50, 11.01), 16: (0.35, 10.25)}  # accepted / drafted, tokens per second


@pytest.mark.parametrize("k", PUBLISHED)
def test_fixed_lengths_give_the_published_rows(k: int) -> None:
    """Simulated over long texts, each as long as the others, the counts are within 3 % of those published."""
    profile, control = Profile.load(NAME), KControl(16)
    decoder = profile.decoder(control, PricedClock(profile.costs()))
    accepted = drafted = tokens = 0
    seconds = 0.0
    for repeat in range(5):
        for number, (task, ids) in enumerate(profile.prompts()):
            done = generate(
                decoder, control, FixedAgent(control, value=k), ids, 3000, 1000 * repeat + number, task
            ).run()
            accepted += sum(c.accepted for c in done.cycles)
            drafted += sum(c.drafted for c in done.cycles)
            tokens, seconds = tokens + len(done.tokens) - 1, seconds + done.seconds
    rate, speed = PUBLISHED[k]
    assert accepted / drafted == pytest.approx(rate, rel=0.03)
    assert tokens / seconds == pytest.approx(speed, rel=0.03)


def test_what_is_reported_is_the_chance_of_acceptance() -> None:
    """Drafted tokens after right ones are accepted as often as the drafter predicts, and as the profile states."""
    profile = Profile.load(NAME)
    env = gym.make("SpecK-v0", trace=NAME, max_new_tokens=2000).unwrapped
    said: list[float] = []
    was: list[bool] = []
    for seed in range(6):
        env.reset(seed=seed)
        done = False
        while not done:
            done = env.step(6)[2]
        for cycle in env.decoder.cycles[:-1]:
            reached = min(cycle.accepted + 1, cycle.drafted)
            said += cycle.nodes.probabilities[:reached].tolist()
            was += [i < cycle.accepted for i in range(reached)]
    said_, was_ = np.array(said), np.array(was)
    for low in (0.2, 0.5, 0.8, 0.95):
        near = np.abs(said_ - low) < 0.05
        assert was_[near].mean() == pytest.approx(said_[near].mean(), abs=4 * 0.5 / np.sqrt(near.sum()))
    assert profile.kinds[0].survival(6)[4] == pytest.approx(0.924**4 * 0.375)


@pytest.mark.parametrize("own", [{}, {"decision": "token"}, {"adjustment_interval": 64}])
def test_it_is_an_environment(own: dict[str, Any]) -> None:
    """Deterministic by seed, thousands of steps without a model; the prompt's name gives the kind of text."""
    rewards = []
    for _ in range(2):
        env = gym.make("SpecK-v0", trace=NAME, max_new_tokens=128, render_mode="ansi", **own).unwrapped
        see, _ = env.reset(seed=5)
        kinds = dict(zip(("code", "prose", "math", "json", "list"), see[env.control.slices["kind"]], strict=True))
        assert kinds[env.prompt.task] == 1
        rng, total, done = np.random.default_rng(0), 0.0, False
        while not done:
            _, reward, done, _, info = env.step(int(rng.integers(env.action_space.n)))
            total += reward
        assert info["tokens"] == 128 and info["speedup"] > 0
        assert "--" in env.render()
        rewards.append(total)
    assert rewards[0] == rewards[1]


def test_training_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command runs without a model: train, validate, table."""
    overrides = [f"env.trace={NAME}", "total_timesteps=2048", "eval_freq=1024", "test_prompts=10"]
    experiment = load_experiment("SpecK-v0", "ppo", overrides)
    train.run(experiment, "SpecK-v0", "ppo", 0, tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    arms = results["arms"]
    assert arms["ppo"]["tokens_per_second"] > arms["plain"]["tokens_per_second"]
    assert arms["static"]["tokens_per_second"] > arms["random"]["tokens_per_second"]
    assert results["machine"]["dtype"] == "synthetic"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"trace": "nothing"},
            "no trace folder and no synthetic profile 'nothing': expected a JSON file, or one of qwen2.5-coder-32b-cpu",
        ),
        ({"trace": NAME, "engine": "llama-server"}, "which takes the place of llama-server; give one of the two"),
        ({"trace": NAME, "temperature": 1.0}, "was recorded with temperature 0.0, not 1.0"),
    ],
)
def test_mistakes_are_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make("SpecK-v0", **keywords)


def test_trees_are_not_played() -> None:
    with pytest.raises(ValueError, match="has chains under greedy decoding only, which do not replay"):
        gym.make("SpecDepth-v0", trace=NAME)


@pytest.mark.parametrize("change", [{"kinds": {}}, {"clock": None, "kinds": 3}, {"concentration": "much"}])
def test_malformed_profiles(change: dict[str, Any], tmp_path: Path) -> None:
    raw = json.loads((DATA / "profiles" / f"{NAME}.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=r"mine.json is not a synthetic profile"):
        Profile.load(str(path))
