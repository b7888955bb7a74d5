"""What a trace teaches: at every state, what each plan of the cycle would have brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from spec_envs.controls.plans import Plans
from spec_envs.vector.chains import Chains
from spec_envs.vector.env import ReplayVectorEnv
from spec_envs.vector.trees import Trees

Actor = Callable[[np.ndarray], np.ndarray]
"""From observations ``[n, …]`` to actions ``[n]``."""


class Lessons(NamedTuple):
    """Cycles that began, and all that could have come of them.

    ``seen`` ``[n, levels, …]``: what is observed at each level of the cycle. ``accepted`` ``[n, plans]`` tokens;
    ``forwards`` ``[n, plans]``, that the drafter makes behind what is there when the cycle's first decision is made; ``begun``
    ``[n]`` seconds that were spent until then.
    """

    seen: np.ndarray
    accepted: np.ndarray
    forwards: np.ndarray
    begun: np.ndarray

    def outcome(self, plan: np.ndarray, forward: float, verification: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and seconds ``[n]`` of following one plan each, under these prices."""
        each = np.arange(len(plan))
        seconds = self.begun + self.forwards[each, plan] * forward + verification[plan]
        return self.accepted[each, plan] + 1.0, seconds


def replay_of(env: gym.Env | ReplayVectorEnv, num_envs: int = 64, **changes: object) -> ReplayVectorEnv:
    """The environments in NumPy of an environment that replays a trace.

    Raises:
        ValueError: one that decodes live; what it would teach is not known.
    """
    if isinstance(env, ReplayVectorEnv):
        return env
    spec = env.spec
    if spec is None or not spec.kwargs.get("trace"):
        raise ValueError(
            "this agent learns from a trace, which knows what every action would have led to: record one with "
            "`make trace` and pass trace=FOLDER"
        )
    return ReplayVectorEnv(num_envs=num_envs, **(spec.kwargs | changes))


def taught(env: ReplayVectorEnv, actor: Actor, plans: Plans, cycles: int, seed: int) -> Lessons:
    """The first ``cycles`` cycles or a few more that begin while ``actor`` plays."""
    observations, _ = env.reset(seed=seed)
    begins, found, count = np.ones(env.num_envs, bool), [], 0
    while count < cycles:
        which = np.flatnonzero(begins)
        found.append(lessons_of(env, plans, observations[which], which))
        count += len(which)
        observations = env.step(actor(observations))[0]
        begins = env.brought["emitted"] > 0
    return Lessons(*(np.concatenate(column) for column in zip(*found, strict=True)))


def lessons_of(env: ReplayVectorEnv, plans: Plans, observations: np.ndarray, which: np.ndarray) -> Lessons:
    """The lessons of environments whose cycle has just begun."""
    play, row = env.play, env.play.row[which]
    left = env.last[which] - row
    seen = np.repeat(observations[:, None], plans.levels, 1)
    if isinstance(play, Trees):
        accepted = play.tables.accepted[
            row[:, None], play.depth[which, None] if plans.levels == 1 else plans.sizes, plans.budgets
        ]
        first = play.depth[which, None]
        forwards = np.maximum(0, plans.sizes - first) if plans.stepwise else np.zeros(accepted.shape)
        if plans.stepwise:
            static = play.tables.static
            seen[:, :, : static.shape[2]] = static[row]
    else:
        assert isinstance(play, Chains)
        accepted = np.minimum(play.right[row, None], plans.sizes)
        asked = play.tables.chain[row, : play.k_max, 4] == 0
        asked &= np.arange(play.k_max) < play.length[row, None]
        forwards = np.concatenate([np.zeros((len(row), 1)), asked.cumsum(1)], 1)
        if plans.stepwise:
            seen[:, :, : play.tables.chain.shape[2]] = play.tables.chain[row]
    accepted = np.minimum(accepted, left[:, None] - 1)
    return Lessons(seen, accepted.astype(np.float32), forwards.astype(np.float32), env.pending[which].copy())
