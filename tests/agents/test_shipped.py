"""The trained agents that come with the package: each loads, and generates the target's own text."""

from __future__ import annotations

import pytest

from spec_envs import agents, generate
from spec_envs.controls import CONTROLS
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.prompts.sets import encode
from tests.support.models.tiny import REAL

SHIPPED_IDS = sorted(path.name for path in agents.SHIPPED.iterdir())


def test_every_replayed_environment_has_an_agent() -> None:
    assert SHIPPED_IDS == ["SpecBudget-v0", "SpecDepth-v0", "SpecK-v0", "SpecTree-v0"]


@pytest.mark.model
@pytest.mark.parametrize("env_id", SHIPPED_IDS)
def test_generates_plain_text_in_fewer_cycles(env_id: str) -> None:
    control, agent = agents.load(env_id)
    assert type(control) is CONTROLS[env_id] and 0 < agent.decision_seconds < 0.01
    decoder = load_decoder(REAL, width=control.width, max_depth=control.max_depth)  # type: ignore[attr-defined]
    prompt = encode(load_tokenizer(REAL), "Write a Python class of a stack, with push, pop and peek.")
    done = generate(decoder, control, agent, prompt, 48, task="mt_bench").run()
    plain = generate(decoder.plain(), None, None, prompt, 48).run()
    assert done.tokens == plain.tokens
    assert len(done.cycles) < len(plain.cycles)
    assert sum(cycle.accepted for cycle in done.cycles) > 0


@pytest.mark.parametrize("env_id", SHIPPED_IDS)
def test_actions_depend_on_observation_and_costs(env_id: str) -> None:
    control, agent = agents.load(env_id)
    assert control.costs is not None
    seen = agent.kept.seen.reshape(-1, agent.width)  # the observations it was trained on
    pace = agent.price(control.costs).pace * control.costs.seconds("verify", 1)
    assert len(set(agent.actions(seen).tolist())) > 1
    dear = CostTable("verification is dear", {1: 0.01, 2: 1.0}, {1: 1.0, 10: 1.0})
    assert agent.price(dear).pace * dear.seconds("verify", 1) < pace
    if env_id == "SpecK-v0":  # only there nothing has to be drafted
        assert not agent.actions(agent.kept.seen[:, 0]).any()
