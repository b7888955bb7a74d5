"""Lessons of a trace: the outcome of each plan of the cycle, at every state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from spec_envs.controls.plans import Plans
from spec_envs.env import SpecEnv
from spec_envs.vector.env import ReplayVectorEnv

Actor = Callable[[np.ndarray], np.ndarray]
"""From observations ``[n, …]`` to actions ``[n]``."""


class Lessons(NamedTuple):
    """Cycles that began, and all their possible outcomes.

    ``seen`` ``[n, levels, …]``: what is observed at each level of the cycle. ``accepted`` ``[n, plans]``: tokens, an
    alternative beside a chain not counted.
    ``forwards`` ``[n, plans]``: forwards that the drafter makes after the cycle's first decision. ``begun`` ``[n]``:
    seconds that were spent before it.
    """

    seen: np.ndarray
    accepted: np.ndarray
    forwards: np.ndarray
    begun: np.ndarray

    def outcome(self, plan: np.ndarray, forward: float, verification: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and seconds ``[n]`` of following one plan each, under these prices."""
        each = np.arange(len(plan))
        seconds = self.begun + self.forwards[each, plan] * forward + verification[plan]
        return self.accepted[each, plan] + 1.0, seconds


def replay_of(env: gym.Env | ReplayVectorEnv, num_envs: int = 64, **changes: object) -> ReplayVectorEnv:
    """Return the environments in NumPy of an environment that replays a trace.

    Raises:
        ValueError: the environment decodes live, where only the outcome of the chosen action is known, or a partner
            decides in it.
    """
    if isinstance(env, ReplayVectorEnv):
        return env
    spec = env.spec
    if spec is None or not spec.kwargs.get("trace"):
        raise ValueError(
            "this agent learns from a trace, which knows what every action would have led to: record one with "
            "`spec-envs trace` and pass trace=FOLDER"
        )
    if isinstance(env.unwrapped, SpecEnv) and env.unwrapped.control.partner:
        raise ValueError(
            "a partner decides in one environment at a time; leave num_envs out, or take an agent that learns from rewards"
        )
    return ReplayVectorEnv(num_envs=num_envs, **(spec.kwargs | changes))


def collected(env: ReplayVectorEnv, actor: Actor, plans: Plans, cycles: int, seed: int) -> Lessons:
    """Return the lessons of the first ``cycles`` cycles, or of a few more, that begin while ``actor`` decides."""
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
    """Return the lessons of environments whose cycle has just begun.

    Args:
        observations: of them ``[n, …]``.
        which: their indices ``[n]``.
    """
    cycles, row = env.cycles, env.under_way.row[which]
    left = (env.last[which] - row)[:, None]
    seen = np.repeat(observations[:, None], plans.levels, 1)
    if plans.stepwise:
        seen[:, :, : env.control.draft_columns] = cycles.observed[row]
    accepted = np.minimum((cycles.accepted - cycles.beside)[row], left - 1).astype(np.float32)
    forwards = np.broadcast_to(cycles.forwards, cycles.accepted.shape)[row].astype(np.float32)
    return Lessons(seen, accepted, forwards, env.pending[which].copy())
