"""A text under an agent."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from spec_envs.controls import Control, Policy
from spec_envs.env import SpecEnv
from spec_envs.generation import Generation


def played(env: SpecEnv, control: Control, agent: Any, tokens: int, seed: int) -> Generation:
    """A text that an environment draws; the agent, which is shown what it looks at only, acts as if it saw everything."""
    env.reset(seed=seed)
    seeing_all = Policy(control, copy.deepcopy(agent))
    seeing_all.looks_at = None
    done, same = (
        Generation(env.decoder, policy, env.decoder.prompt, tokens, np.random.default_rng(seed)).run()
        for policy in (Policy(control, agent), seeing_all)
    )
    assert same.actions == done.actions
    return done
