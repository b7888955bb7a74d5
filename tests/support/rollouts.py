"""Generations under an agent, and rollouts of an environment."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np

from spec_envs.controls import Control, Policy
from spec_envs.env import SpecEnv
from spec_envs.generation import Generation


def generation_under(env: SpecEnv, control: Control, agent: Any, tokens: int, seed: int) -> Generation:
    """Return a generation of the environment's first prompt under an agent.

    Asserts that the agent acts the same when it is given the whole observation instead of the entries in ``looks_at``.
    """
    env.reset(seed=seed)
    seeing_all = Policy(control, copy.deepcopy(agent))
    seeing_all.looks_at = None
    done, same = (
        Generation(env.decoder, policy, env.decoder.prompt, tokens, np.random.default_rng(seed)).run()
        for policy in (Policy(control, agent), seeing_all)
    )
    assert same.actions == done.actions
    return done


def drafter_of(env_id: str, tiny: dict[str, Any]) -> dict[str, str]:
    """Return a drafter for problems that cannot use the tiny head alone; over a link it would read states of the
    cloud's target."""
    several = f"lookup,{tiny['drafter']}"
    own = {"SpecTopK-v0": "lookup", "SpecDVI-v0": "auto", "SpecDrafter-v0": several}
    return {"drafter": own[env_id]} if env_id in own else {}


def rollout(env: gym.Env, seed: int, steps: int) -> list:
    """Return everything that an environment returns under random actions, with arrays as lists."""
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    trace: list = [observation.tolist(), info]
    for _ in range(steps):
        *result, info = env.step(int(rng.integers(env.action_space.n)))
        trace.append(([r.tolist() if isinstance(r, np.ndarray) else r for r in result], info))
        if result[2]:
            observation, info = env.reset()
            trace.append((observation.tolist(), info))
    return trace
