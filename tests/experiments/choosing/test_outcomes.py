"""Seconds of choices between drafters on a trace are those of the environment, and no policy takes less than the clairvoyant
optimum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs.controls.drafter import DrafterControl
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.experiments.choosing.outcomes import Clairvoyant, Outcomes
from tests.support.recordings import costs_of

if TYPE_CHECKING:
    from spec_envs.experiments.traces.plan import Plan

TOKENS = 20


class Played:
    """Texts of a trace in an environment, and their outcomes."""

    def __init__(self, trace: PortfolioTrace, plan: Plan, folder: Path, tokens: int = TOKENS, **changes: Any):
        clock = costs_of(trace, folder)
        sizes = {key: plan.env[key] for key in ("sizes", "depths", "width", "drafter", "target")} | changes
        shared = {"trace": str(trace.folder), "split": "all", "clock": clock, "max_new_tokens": tokens}
        self.env: Any = gym.make("SpecDrafter-v0", **shared, **sizes).unwrapped
        control: DrafterControl = self.env.control
        self.actions, self.texts = int(control.action_space.n), range(len(trace.texts))
        self.outcomes = Outcomes(trace, control, CostTable.load(clock), self.texts, tokens)

    @functools.cached_property
    def best(self) -> list[Clairvoyant]:
        """The fastest choices of every text."""
        return self.outcomes.clairvoyant()

    def seconds(self, text: int, choose: Callable[[int], int]) -> float:
        """Return the seconds of a text, where ``choose`` maps the row of the trace to an action."""
        self.env.reset(options={"prompt": self.env.prompts[text]})
        spent, done = 0.0, False
        while not done:
            _, _, done, _, info = self.env.step(choose(self.env.decoder.verifier.position.row))
            spent += sum(info["seconds"].values())
        return spent

    def least(self, text: int, sequence: tuple[int, ...] = ()) -> float:
        """Return the least seconds of a text over all continuations of a sequence of actions."""
        self.env.reset(options={"prompt": self.env.prompts[text]})
        spent, done = 0.0, False
        for action in sequence:
            _, _, done, _, info = self.env.step(action)
            spent += sum(info["seconds"].values())
            if done:
                return spent
        return min(self.least(text, (*sequence, action)) for action in range(self.actions))


@pytest.fixture(scope="module")
def played(portfolio: PortfolioTrace, portfolio_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Played:
    return Played(portfolio, portfolio_plan, tmp_path_factory.mktemp("costs"))


def test_static_seconds_equal_those_of_environment(played: Played) -> None:
    static = played.outcomes.static()
    for text in played.texts:
        found = [played.seconds(text, lambda row, action=action: action) for action in range(played.actions)]
        np.testing.assert_allclose(static[text], found)


def test_choices_by_position_charge_what_drafters_catch_up_with(played: Played, portfolio: PortfolioTrace) -> None:
    rng = np.random.default_rng(0)
    chosen = rng.integers(played.actions, size=(portfolio.rows, 5))
    chosen[rng.random(chosen.shape) < 0.5] = 0  # so that drafters have much to catch up with
    seconds = played.outcomes.seconds(chosen)
    for text in played.texts:
        found = [played.seconds(text, lambda row, own=own: own[row]) for own in chosen.T]
        np.testing.assert_allclose(seconds[text], found)


def test_no_policy_takes_less_than_clairvoyant(played: Played) -> None:
    rng, best = np.random.default_rng(1), np.array([found.seconds for found in played.best])
    assert (best <= played.outcomes.static().min(1) + 1e-9).all()
    for text in played.texts:
        for _ in range(5):
            assert played.seconds(text, lambda row: int(rng.integers(played.actions))) >= best[text] - 1e-9


def test_clairvoyant_seconds_are_least_of_all_sequences(
    portfolio: PortfolioTrace, portfolio_plan: Plan, tmp_path: Path
) -> None:
    played = Played(portfolio, portfolio_plan, tmp_path, tokens=5, sizes=(2,), depths=(1,))
    for text in (1, 4):
        assert played.best[text].seconds == pytest.approx(played.least(text))


def test_clairvoyant_actions_take_its_seconds(played: Played) -> None:
    for text, found in zip(played.texts, played.best, strict=True):
        actions = iter(found.actions)
        assert played.seconds(text, lambda row, actions=actions: next(actions)) == pytest.approx(found.seconds)
        cycles = played.env.decoder.cycles
        assert len(cycles) == len(found.actions) and sum(cycle.verified for cycle in cycles) == found.verified
        assert sum(cycle.accepted for cycle in cycles) == found.accepted
