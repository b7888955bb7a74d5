"""The synthetic profile gives the published counts, and works as a whole environment."""

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
def test_fixed_lengths_give_published_counts(k: int) -> None:
    """Counts over long simulated texts of equal length are within 3 % of those published."""
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


def test_reported_probability_is_rate_of_acceptance() -> None:
    """Tokens whose predecessors were accepted are accepted as often as the drafter predicts, and as the profile
    states."""
    profile = Profile.load(NAME)
    env = gym.make("SpecK-v0", trace=NAME, max_new_tokens=2000).unwrapped
    reported: list[float] = []
    outcomes: list[bool] = []
    for seed in range(6):
        env.reset(seed=seed)
        done = False
        while not done:
            done = env.step(6)[2]
        for cycle in env.decoder.cycles[:-1]:
            reached = min(cycle.accepted + 1, cycle.drafted)
            reported += cycle.nodes.probabilities[:reached].tolist()
            outcomes += [i < cycle.accepted for i in range(reached)]
    reported_array, accepted_array = np.array(reported), np.array(outcomes)
    for low in (0.2, 0.5, 0.8, 0.95):
        near = np.abs(reported_array - low) < 0.05
        assert accepted_array[near].mean() == pytest.approx(
            reported_array[near].mean(), abs=4 * 0.5 / np.sqrt(near.sum())
        )
    assert profile.kinds[0].survival(6)[4] == pytest.approx(0.924**4 * 0.375)


@pytest.mark.parametrize("own", [{}, {"decision": "token"}, {"adjustment_interval": 64}])
def test_environment_on_profile(own: dict[str, Any]) -> None:
    """Episodes are deterministic by seed and need no model; the prompt's task is the kind of text."""
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


def test_training_on_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command runs without a model: training, validation, result table."""
    overrides = [f"env.trace={NAME}", "total_timesteps=2048", "eval_freq=1024", "test_prompts=10"]
    experiment = load_experiment("SpecK-v0", "ppo-live", overrides)
    train.run(experiment, "SpecK-v0", "ppo-live", 0, tmp_path / "run")
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
def test_invalid_keywords_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make("SpecK-v0", **keywords)


def test_trees_are_refused() -> None:
    with pytest.raises(ValueError, match="has chains under greedy decoding only, which do not replay"):
        gym.make("SpecDepth-v0", trace=NAME)


@pytest.mark.parametrize("change", [{"kinds": {}}, {"clock": None, "kinds": 3}, {"concentration": "much"}])
def test_malformed_profiles_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    raw = json.loads((DATA / "profiles" / f"{NAME}.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=r"mine.json is not a synthetic profile"):
        Profile.load(str(path))
