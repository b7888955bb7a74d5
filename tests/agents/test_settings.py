"""Hyper-parameters of agents: every one is described, and values that do not fit are refused in one sentence."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import numpy as np
import pytest

from spec_envs.agents import AGENTS
from spec_envs.agents.rules.confidence import ConfidenceAgent
from spec_envs.controls import make_control


@pytest.mark.parametrize("name", AGENTS)
def test_every_hyperparameter_has_a_meaning(name: str) -> None:
    settings, page = AGENTS[name].Settings, inspect.getdoc(AGENTS[name]) or ""
    for key, field in settings.model_fields.items():
        assert field.description and f"- `{key}" in page
    given = {"value": 2} if name == "fixed" else {}
    assert settings.read(given, name).model_dump().items() >= given.items()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("fixed", {}, "value is missing; expected a whole number or a text"),
        ("confidence", {"threshold": 2.0}, "threshold is 2.0; expected a number from 0 to 1"),
        ("adaptive-k", {"k_min": 9, "k_max": 3}, r"k_min is 9; expected at most k_max \(3\)"),
        ("ucb", {"arms": [99]}, r"arms is \[99\]; expected at least one length of at most 16 tokens"),
        ("ppo", {"n_epochs": 0}, "n_epochs is 0; expected a whole number of 1 or more"),
        ("ppo", {"learning_rate": float("inf")}, "learning_rate is inf; expected a number of 0 or more"),
        ("ppo", {"target_kl": "x"}, "target_kl is 'x'; expected a number of 0 or more or null"),
        ("ppo", {"clip_range": -1}, "clip_range is -1; expected a number of 0 or more or a function"),
        ("dqn", {"gradient_steps": -2}, "gradient_steps is -2; expected a whole number of -1 or more"),
        (
            "dqn",
            {"train_freq": 0},
            r'train_freq is 0; expected a whole number of 1 or more, or a list like \[4, "step"\]',
        ),
        ("hindsight", {"reads": "all"}, "reads is 'all'; expected one of cycle, everything"),
        ("decision-tree", {"depth": 33}, "depth is 33; expected a whole number from 1 to 32"),
    ],
)
def test_unfit_values_are_refused(name: str, given: dict[str, Any], message: str) -> None:
    decision = {"decision": "token"} if name == "confidence" else {}
    with pytest.raises(ValueError, match=message):
        AGENTS[name](control=make_control("k", decision), **given)


def test_values_may_be_lists_numbers_of_numpy_and_functions() -> None:
    control = make_control("k", {})
    agent = AGENTS["dqn"](
        control=control, pi_arch=[], train_freq=[4, "step"], batch_size=np.int64(16), gradient_steps=-1
    )
    assert agent.settings.model_dump()["batch_size"] == 16
    assert agent.predict(np.zeros(control.observation_space.shape, np.float32))[0] in range(control.action_space.n)
    AGENTS["ppo"](control=control, clip_range=lambda remaining: 0.1 * remaining)


def test_a_rule_can_be_pickled() -> None:
    agent = ConfidenceAgent(make_control("k", {"decision": "token"}), threshold=0.25)
    assert pickle.loads(pickle.dumps(agent)).settings == agent.settings
