"""Rules that choose who drafts use what a cycle has shown, decode faster than plain, and can be tuned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

from spec_envs.agents import AGENTS
from spec_envs.agents.choosers.base import DrafterRule
from spec_envs.controls import make_control
from spec_envs.controls.drafter import DrafterControl
from spec_envs.controls.k import KControl
from spec_envs.decoding.clock import CostTable
from spec_envs.experiments import tune
from spec_envs.experiments.config import load_experiment
from tests.support.observations import observation_of
from tests.support.rollouts import drafter_of, generation_under

DRAFTERS = "lookup,smollm2-135m-draft,smollm2-135m-eagle3"
TABLE = CostTable("made up", {1: 2.0, 9: 2.8}, {1: 0.2, 4: 0.5})  # each further row 0.1 s; a forward of a tree 0.5 s
RULES = sorted(name for name, kind in AGENTS.items() if issubclass(kind, DrafterRule))
START = np.array([True])


def control_of(drafters: str = DRAFTERS, sizes: tuple[int, ...] = (2, 4)) -> DrafterControl:
    control = DrafterControl(drafter=drafters, sizes=sizes, depths=tuple(range(len(sizes))))
    control.costs = TABLE
    return control


def prices(control: DrafterControl) -> np.ndarray:
    """Return the price of every arm in units of a plain step."""
    return AGENTS["hedge"](control=control).prices


def test_price_of_an_arm_has_its_forwards() -> None:
    found = prices(control_of()) * 2.0
    copies, chains, trees = [2.2, 2.4], [2.2 + 2 * 0.2, 2.4 + 4 * 0.2], [2.2 + 0.2, 2.4 + 0.2 + 0.5]
    np.testing.assert_allclose(found, [2.0, *copies, *chains, *trees])


def test_hedge_scores_every_size_of_every_known_drafter() -> None:
    control = control_of()
    agent = AGENTS["hedge"](control=control, rate=0.5, pace=1.0, memory=0.5, matches=())
    agent.predict(observation_of(control), episode_start=START)
    seen = observation_of(control, scores=[0.75, 0.0, 0.25], known=[1, 0, 1])
    agent.predict(seen, deterministic=True)
    gained = 1 + np.array([0, 2, 3, 0, 0, 1, 1]) - prices(control)
    gained[3:5] = 0  # what the draft model would have had right is not known
    np.testing.assert_allclose(agent.weights[0], 0.5 * gained)
    before = agent.weights[0].copy()
    action, _ = agent.predict(observation_of(control, known=[1, 0, 0]), deterministic=True)
    assert action == agent.weights[0].argmax()
    np.testing.assert_allclose(agent.weights[0, 3:5], 0)
    np.testing.assert_allclose(agent.weights[0, 5:], 0.5 * before[5:])  # forgotten by half, and not moved


def test_hedge_keeps_weights_apart_by_match() -> None:
    control = control_of()
    agent = AGENTS["hedge"](control=control, matches=(2, 6))
    for match, scores in ((8, 1.0), (0, 0.0)) * 6:
        agent.predict(observation_of(control, match=match / 16))
        agent.predict(observation_of(control, match=3 / 16, scores=scores, known=1))
    assert (agent.weights[0] <= 0).all() and control.settings()[agent.weights[2].argmax()] == "lookup:4"
    assert agent.predict(observation_of(control, match=1.0), deterministic=True, episode_start=START)[0] == 2


def test_rules_where_no_drafter_copies() -> None:
    control = control_of("smollm2-135m-draft,smollm2-135m-eagle3")
    agent = AGENTS["hedge"](control=control)
    agent.predict(observation_of(control), episode_start=START)
    agent.predict(observation_of(control, scores=[1.0, 0.0], known=[1, 0]))
    assert agent.weights.argmax() == 2 and not agent.weights[1:].any()
    with pytest.raises(
        ValueError, match=r"no drafter of smollm2-135m-draft, .* copies alone; expected lookup or suffix"
    ):
        AGENTS["fixed-order"](control=control)


def test_hedge_draws_from_its_weights_unless_deterministic() -> None:
    control = control_of("lookup,smollm2-135m-draft", (2,))
    agent = AGENTS["hedge"](control=control, memory=1.0, rate=0.0, matches=(), seed=1)
    agent.weights[0] = np.log([0.7, 0.1, 0.2])
    seen = observation_of(control)
    drawn = [agent.predict(seen, episode_start=START)[0] for _ in range(2000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 2000, [0.7, 0.1, 0.2], atol=0.03)
    assert {agent.predict(seen, episode_start=START, deterministic=True)[0] for _ in range(5)} == {0}


def test_bandit_finds_the_best_arm() -> None:
    """Tokens are drawn with means that enumeration can rank."""
    control, rng = control_of(), np.random.default_rng(0)
    agent = AGENTS["ucb-drafter"](control=control, discount=1.0, exploration=0.3)
    right = np.array([0, 0.4, 0.4, 0.9, 0.9, 0.5, 0.5])
    sizes = np.array([0, 2, 4, 2, 4, 2, 4])
    worth = [sum(p**i for i in range(n + 1)) for p, n in zip(right, sizes, strict=True)] / prices(control)
    seen, start, chosen = observation_of(control), START, []
    for _ in range(3000):
        action, _ = agent.predict(seen, episode_start=start)
        accepted = int(np.argmin(np.append(rng.random(sizes[action]) < right[action], False)))
        seen, start = observation_of(control, last_accepted=accepted / 4), np.array([False])
        chosen.append(action)
    assert chosen[-1000:].count(int(np.argmax(worth))) > 700


def test_fixed_order_copies_where_enough_matches() -> None:
    control = control_of("smollm2-135m-draft,suffix,lookup")
    agent = AGENTS["fixed-order"](control=control, copier="lookup:4", match=3, otherwise="smollm2-135m-draft:2")
    chosen = [agent.predict(observation_of(control, match=[1.0, n / 16]))[0] for n in (2, 3, 16)]
    assert [control.settings()[action] for action in chosen] == ["smollm2-135m-draft:2", "lookup:4", "lookup:4"]


@pytest.mark.parametrize(
    ("name", "control", "settings", "message"),
    [
        ("hedge", KControl(), {}, "HedgeAgent controls SpecDrafter-v0, not SpecK-v0"),
        ("hedge", None, {"matches": (4, 2)}, r"matches is \[4, 2\]; expected ascending numbers of tokens"),
        ("hedge", None, {"rate": 1e308}, r"rate is 1e\+308; expected a number from 0 to 100"),
        ("fixed-order", None, {"copier": "plain"}, "copier is 'plain'; expected one of lookup:2, lookup:4"),
        ("fixed-order", None, {"otherwise": "lookup:3"}, "otherwise is 'lookup:3'; expected one of plain, lookup:2"),
    ],
)
def test_unsuitable_problems_and_settings_are_refused(name: str, control: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AGENTS[name](control=control or control_of(), **settings)


@pytest.mark.parametrize("name", ["hedge", "ucb-drafter"])
def test_rule_without_costs_is_refused(name: str) -> None:
    control = DrafterControl(drafter=DRAFTERS)
    agent = AGENTS[name](control=control)
    with pytest.raises(ValueError, match="needs the seconds of forwards: set the control's costs to a CostTable"):
        for _ in range(2):
            agent.predict(observation_of(control))


@pytest.mark.parametrize("name", RULES)
def test_rules_are_faster_than_plain(name: str, tiny: dict[str, Any]) -> None:
    """Each stanza of the YAML is faster than plain decoding on the tiny models, and varies who drafts."""
    experiment = load_experiment("SpecDrafter-v0", name)
    settings = {**experiment.hyperparameters}
    keywords = tiny | drafter_of("SpecDrafter-v0", tiny)
    if name == "fixed-order":
        settings |= {"match": 3, "otherwise": f"{tiny['drafter']}:4"}
    env = gym.make("SpecDrafter-v0", **keywords).unwrapped
    control = make_control("SpecDrafter-v0", keywords)
    control.costs = CostTable.load(tiny["clock"])
    agent = AGENTS[experiment.agent](control=control, **settings)
    done = [generation_under(env, control, agent, 60, seed) for seed in range(4)]
    assert np.mean([text.tokens_per_second for text in done]) > env.plain_rate
    assert len({action for text in done for action in text.actions}) > 1


def test_tuning_writes_valid_hyperparameters(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keywords = tiny | drafter_of("SpecDrafter-v0", tiny) | {"max_new_tokens": 16}
    given = [f"env.{key}={value}" for key, value in keywords.items()]
    for name in RULES:
        given_to = [*given, f"hyperparameters.otherwise={tiny['drafter']}:4"] if name == "fixed-order" else given
        arguments = ["tune", "SpecDrafter-v0", "--agent", name, "--root", str(tmp_path), "--prompts", "2"]
        monkeypatch.setattr(sys, "argv", [*arguments, "--tokens", "16", "--trials", "2", "--set", *given_to])
        tune.main()
        best = yaml.safe_load((tmp_path / "SpecDrafter-v0" / name / "best.yml").read_text())["hyperparameters"]
        AGENTS[name](control=make_control("SpecDrafter-v0", keywords), **best)
