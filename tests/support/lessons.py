"""Lessons of random decisions on a trace."""

from __future__ import annotations

import copy

import numpy as np

from spec_envs.agents.traced.lessons import Lessons, collected
from spec_envs.controls.base import Control
from spec_envs.vector.env import ReplayVectorEnv


def random_lessons(env: ReplayVectorEnv, control: Control, cycles: int = 60) -> Lessons:
    """Return lessons of cycles in which random actions are taken."""
    rng = np.random.default_rng(0)
    return collected(
        copy.deepcopy(env), lambda seen: rng.integers(env.choices, size=len(seen)), control.plans(), cycles, 0
    )
