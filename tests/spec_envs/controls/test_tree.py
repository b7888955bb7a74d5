"""SpecTree-v0, where depth and budget are decided together: actions, observation and static settings."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs import generate
from spec_envs.agents import AGENTS
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.controls import Policy, candidates
from spec_envs.controls.base import COST_ROWS
from spec_envs.controls.tree import EXPAND, TreeControl
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.loading import load_decoder
from spec_envs.experiments.measure import static
from spec_envs.experiments.measure.arms import Encoded, decoded
from spec_envs.experiments.reports.report import settings_played

PROMPT = [3, 4, 5]


def make(tiny: dict, **keywords: Any) -> Any:
    env = gym.make("SpecTree-v0", **{**tiny, "max_new_tokens": 200, **keywords}).unwrapped
    env.reset(seed=0)
    return env


def test_actions(tiny: dict) -> None:
    env = make(tiny, budgets=[0, 3, 9])
    assert env.action_space.n == 4
    steps = [env.step(action)[4] for action in (EXPAND, EXPAND, 2, 3, 1)]
    assert [info["emitted"] > 0 for info in steps] == [False, False, True, True, True]
    assert [(info["drafted"], info["verified"]) for info in steps[2:]] == [(210, 3), (10, 9), (10, 0)]
    assert steps[4]["emitted"] == 1  # budget 0 is plain decoding


def test_depth_0_costs_only_the_root_forward(tiny: dict) -> None:
    env = make(tiny)
    table = env.decoder.clock.table
    for _ in range(3):
        info = env.step(3)[4]
        assert info["drafted"] == 10 and info["verified"] == 7
        assert info["seconds"]["draft"] == pytest.approx(table.seconds("draft", 1))
        assert info["seconds"]["verify"] == pytest.approx(table.seconds("verify", 8))


def test_expanding_at_maximum_depth_verifies_largest_budget(tiny: dict) -> None:
    env = make(tiny, max_depth=2, budgets=[1, 5])
    infos = [env.step(EXPAND)[4] for _ in range(6)]
    assert [info["verified"] for info in infos] == [0, 0, 5, 0, 0, 5]
    assert infos[2]["drafted"] == 210


def test_tree_is_verified_when_drafter_adds_nothing(tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(tiny, budgets=[1, 5])
    monkeypatch.setattr(env.decoder.drafter, "expand", lambda tree: 0)
    assert env.step(EXPAND)[4]["verified"] == 5


def test_observation(tiny_decoder: Decoder, rng: np.random.Generator) -> None:
    control = TreeControl()
    assert list(control.slices) == [
        *("frontier", "survival", "gains", "entropy"),
        *("expansions", "recent", "position", "context"),
    ]
    tiny_decoder.start(PROMPT, 40, rng)
    for depth in range(4):
        seen = control.observe(tiny_decoder)
        tree = tiny_decoder.tree
        assert tree.expansions == depth and control.observation_space.contains(seen)
        part = {name: seen[where] for name, where in control.slices.items()}
        np.testing.assert_allclose(part["frontier"], np.exp(tree.scores[tree.frontier]), rtol=1e-5)
        assert np.count_nonzero(part["survival"]) == depth + 1
        best = np.sort(np.exp(tree.scores))[::-1]
        expected = [best[:budget].sum() / 13 for budget in control.budgets]
        np.testing.assert_allclose(part["gains"].cumsum(), expected, rtol=1e-5)
        assert part["entropy"][0] == pytest.approx(float(tree.entropies[depth][0]) / 10)
        assert control.act(tiny_decoder, EXPAND) is None
    assert TreeControl(cost_features=True).slices["costs"] == slice(42, 42 + len(COST_ROWS) + 1)


def test_agent_is_given_only_entries_it_looks_at(tiny_decoder: Decoder, rng: np.random.Generator) -> None:
    class RecordingAgent(RandomAgent):
        looks_at = ("frontier", "position")
        seen: list[np.ndarray] = []  # noqa: RUF012

        def predict(self, observation: np.ndarray, *args: Any, **keywords: Any) -> tuple[Any, Any]:
            self.seen.append(observation)
            return super().predict(observation)

    control = TreeControl()
    agent = RecordingAgent(control)
    generate(tiny_decoder, control, agent, PROMPT, 40).run()
    shown = {name for name, place in control.slices.items() if np.any([seen[place] for seen in agent.seen])}
    assert shown == {"frontier", "position"}
    tiny_decoder.start(PROMPT, 40, rng)
    everything = control.observe(tiny_decoder)
    for name, place in control.slices.items():
        np.testing.assert_array_equal(control.observe(tiny_decoder, (name,))[place], everything[place])


def test_greedy_text_is_plain_text_under_random_actions(tiny: dict, tiny_decoder: Decoder) -> None:
    plain = load_decoder(tiny["target"], None, "cpu", "float32")
    control = TreeControl(budgets=(0, 2, 7))
    agent, shapes = RandomAgent(control, seed=1), set()
    for prompt in (PROMPT, [5, 6], [9, 2, 9, 2]):
        done = generate(tiny_decoder, control, agent, prompt, 60).run()
        assert done.tokens == generate(plain, None, None, prompt, 60).run().tokens
        shapes |= {(cycle.depth, cycle.verified) for cycle in done.cycles}
    assert len(shapes) > 4


def test_fixed_agent_follows_its_setting(tiny_decoder: Decoder) -> None:
    control = TreeControl()
    assert control.settings()[:2] == ("0x1", "0x3") and len(control.settings()) == 13 * 13
    for value in ("0x1", "0x7", "2x7", "12x95"):
        done = generate(tiny_decoder, control, FixedAgent(control, value=value), PROMPT, 20).run()
        assert {f"{cycle.depth}x{cycle.verified}" for cycle in done.cycles} == {value}
    with pytest.raises(ValueError, match=r"value is '2x8'; expected one of 0x1, 0x3, .*, …, 12x95"):
        FixedAgent(control, value="2x8")


def test_static_settings_of_any_budget(tiny: dict, tiny_decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ([0, 4], [3, 8]):
        policy = static.static_policy(TreeControl(), setting)
        done = generate(tiny_decoder, policy.control, policy.agent, PROMPT, 20).run()
        assert {(cycle.depth, cycle.verified) for cycle in done.cycles} == {tuple(setting)}
    monkeypatch.setattr(candidates, "DEPTHS", (1, 2))
    monkeypatch.setattr(candidates, "BUDGETS", (7,))
    monkeypatch.setattr(static, "PROMPTS", 2)
    found = static.best_static(tiny, TreeControl(max_depth=4))
    assert {"depth 0, budget 7", "depth 2, budget 1"} <= set(found.tokens_per_second)


def test_histogram_counts_settings_followed(tiny_decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    control = TreeControl(max_depth=2, budgets=(1, 7))
    tiny_decoder = sized_for(tiny_decoder, control)
    sample = decoded(tiny_decoder, Policy(control, RandomAgent(control, seed=0)))(Encoded("a task", PROMPT), 80, 0)
    cycles = [f"{cycle.depth}x{cycle.verified}" for cycle in tiny_decoder.cycles]
    histogram = settings_played(control, [sample])["a task"]
    assert histogram == {setting: cycles.count(str(setting)) for setting in control.settings()}
    assert len(histogram) > 3
    monkeypatch.setattr(
        tiny_decoder.drafter, "expand", lambda tree: 0
    )  # no further decision: every cycle is one decision
    sample = decoded(tiny_decoder, Policy(control, RandomAgent(control, seed=0)))(Encoded("a task", PROMPT), 20, 0)
    assert sum(settings_played(control, [sample])["a task"].values()) == len(sample.actions) == sample.cycles


def sized_for(decoder: Decoder, control: TreeControl) -> Decoder:
    """Return a decoder of the same models whose trees have the size of the control's."""
    return Decoder(decoder.verifier, decoder.drafter, decoder.clock, decoder.eos, control.max_depth)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"budgets": [3, 3]}, ValueError, "expected ascending numbers of nodes"),
        ({"budgets": [-1, 3]}, ValueError, "expected ascending numbers of nodes"),
        ({"budgets": "all"}, ValueError, "budgets is 'all'; expected numbers or one of ltd, ltd-paper"),
        ({"max_depth": 0}, ValueError, "max_depth and width are 0 and 10; expected at least 1"),
        ({"observation": "ltd"}, ValueError, "observation is 'ltd'; expected one of default"),
        ({"depth": 3}, TypeError, "SpecTree-v0 got an unexpected keyword argument 'depth'"),
    ],
)
def test_invalid_keywords_are_refused(keywords: dict, error: type[Exception], message: str, tiny: dict) -> None:
    with pytest.raises(error, match=message):
        gym.make("SpecTree-v0", **tiny, **keywords)


def test_tree_policy_takes_no_partner() -> None:
    with pytest.raises(ValueError, match="but a policy of SpecTree-v0 takes no partner"):
        TreeControl().compose(TreeControl(), AGENTS["random"](control=TreeControl()))
