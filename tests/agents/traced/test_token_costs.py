"""The cost of a token depends on its place of the text, and agents that learn from a trace weigh it by that."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spec_envs.agents import AGENTS
from spec_envs.agents.traced import lessons as lessons_module
from spec_envs.agents.traced.lessons import Lessons, collected
from spec_envs.controls.k import KControl
from spec_envs.decoding.clock import CostTable
from spec_envs.vector.env import ReplayVectorEnv
from tests.support.traced import control_of

PRICES = CostTable("made up", {1: 1.0, 2: 1.3, 3: 1.6}, {1: 0.1})
CONTROL: Any = KControl(k_max=2, decision="token")
EVERY = 2048


def test_all_tokens_of_plain_decoding_cost_the_same(vectors: dict[str, ReplayVectorEnv]) -> None:
    found = collected(
        copy.deepcopy(vectors["k"]), lambda seen: np.zeros(len(seen), int), control_of("k").plans(), 200, 0
    )
    np.testing.assert_allclose(found.cost, 1.0, rtol=1e-5)


@pytest.mark.parametrize("case", ["token", "tree"])
def test_cost_is_that_of_the_tokens_ahead(
    case: str, vectors: dict[str, ReplayVectorEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first cycle of a text to its end, a token costs the text's seconds over its tokens."""
    monkeypatch.setattr(lessons_module, "AHEAD", 10**6)
    env, rng = copy.deepcopy(vectors[case]), np.random.default_rng(0)
    seconds, tokens, first = np.zeros(env.num_envs), np.zeros(env.num_envs), dict[int, float]()

    def actor(seen: np.ndarray) -> np.ndarray:
        """Add what the step before brought to the first text of every environment, and return random actions."""
        seconds[:] += sum(env.brought["seconds"].values())
        tokens[:] += env.brought["emitted"]
        for i in np.flatnonzero(env.ended):
            first.setdefault(int(i), seconds[i] / tokens[i])
        return rng.integers(env.choices, size=len(seen))

    lessons = collected(env, actor, control_of(case).plans(), 400, 0)
    assert sorted(first) == list(range(env.num_envs))
    costs = lessons.cost[: env.num_envs]  # of the first cycle of every environment
    expected = np.array([first[i] for i in range(env.num_envs)])
    np.testing.assert_allclose(costs / costs[0], expected / expected[0], rtol=1e-5)
    assert np.ptp(costs) > 0.1


def two_kinds() -> Lessons:
    """Return cycles of two kinds of text, which observations tell apart: copies that are all right and cost no forward,
    and drafts of which half of the first tokens are right, and no second one."""
    rng, copied, slices = np.random.default_rng(0), np.arange(EVERY) % 2 == 0, CONTROL.slices
    seen = np.zeros((EVERY, 3, len(CONTROL.observation_space.low)), np.float32)
    seen[..., slices["free"].start], seen[..., slices["drafted"].start] = copied[:, None], np.arange(3) / 2
    right = np.where(copied, 2, rng.random(EVERY) < 0.5)
    accepted = np.minimum(right[:, None], np.arange(3)).astype(np.float32)
    forwards = np.where(copied[:, None], 0, np.arange(3)).astype(np.float32)
    none = np.zeros_like(accepted)
    cost = np.where(copied, 0.7, 1.3).astype(np.float32)
    return Lessons(seen, accepted, forwards, np.zeros(EVERY), none, none, cost)


@pytest.mark.parametrize("name", ["hindsight", "exact-pg"])
def test_slow_texts_are_not_given_up(name: str) -> None:
    """Drafting a token where texts are not copied emits 1.5 tokens in 1.4 plain steps, but fewer tokens per second than
    there are over both kinds of text: with tokens that all cost the same it is given up, though it takes longer so."""
    env: Any = SimpleNamespace(cost_tables=[PRICES])
    drafts = {}
    for weighed in (True, False):
        lessons = two_kinds()
        if not weighed:
            lessons = lessons._replace(cost=np.ones(EVERY, np.float32))
        agent: Any = AGENTS[name](control=CONTROL, hidden=16, steps=300, batch_size=256)
        for _ in agent.fit(lessons, lessons, env):
            pass
        drafts[weighed] = agent.actions(lessons.seen[:2, 0])
    assert drafts[True].tolist() == [1, 1]
    assert drafts[False].tolist() == [1, 0]
