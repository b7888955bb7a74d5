"""Lessons of a trace: the outcome of each plan of the cycle, at every state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from spec_envs.controls.plans import Plans, Prices
from spec_envs.env import SpecEnv
from spec_envs.vector.env import ReplayVectorEnv

AHEAD = 16  # tokens over which the cost of a token is measured; 8 and 24 taught the same

Actor = Callable[[np.ndarray], np.ndarray]
"""From observations ``[n, …]`` to actions ``[n]``."""


class Lessons(NamedTuple):
    """Cycles that began, and all their possible outcomes.

    ``seen`` ``[n, levels, …]``: what is observed at each level of the cycle. ``accepted`` ``[n, plans]``: tokens, an
    alternative beside a chain not counted. ``forwards`` ``[n, plans]``: forwards that the drafter makes after the cycle's
    first decision. ``begun`` ``[n]``: seconds that were spent before it. ``beside``, ``further`` ``[n, plans]``: how many
    alternatives beside a chain are accepted, and how many are verified. ``cost`` ``[n]``: seconds of a token of the text
    from here on, in units of their mean.
    """

    seen: np.ndarray
    accepted: np.ndarray
    forwards: np.ndarray
    begun: np.ndarray
    beside: np.ndarray
    further: np.ndarray
    cost: np.ndarray

    @property
    def worth(self) -> np.ndarray:
        """The tokens that each plan emits, weighed by their ``cost``, ``[n, plans]``."""
        worth: np.ndarray = self.cost[:, None] * (self.accepted + self.beside + 1)
        return worth

    def seconds(self, prices: Prices) -> np.ndarray:
        """Return the seconds of each plan, ``[n, plans]``."""
        drafting: np.ndarray = self.begun[:, None] + self.forwards * prices.forward
        drafting += prices.verification + self.further * prices.alternative
        return drafting

    @property
    def caught(self) -> float:
        """Chance that an alternative is right where the first wrong token of a chain was drafted by a forward."""
        wrong = self._own & (np.arange(1, self.accepted.shape[1]) == self.accepted[:, -1:] + 1)
        return float(self.beside[:, -1].sum() / max(1, wrong.sum()))

    @property
    def verified(self) -> float:
        """Alternatives that are verified beside a token that was drafted by a forward."""
        return float(self.further[:, -1].sum() / max(1, self._own.sum()))

    @property
    def _own(self) -> np.ndarray:
        """True for the tokens of the longest chain that are drafted by a forward, ``[n, longest]``."""
        return np.diff(self.forwards, axis=1) > 0


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
    """Return the lessons of the first ``cycles`` cycles, or of a few more, that begin while ``actor`` decides.

    The texts are given, so what a policy can save are seconds. Where texts go fast, as where they are copied, a token
    that is accepted saves fewer of them than where they go slowly. Tokens are therefore weighed by what they cost while
    ``actor`` decides. If all counted the same, a policy would give up drafting where texts go slowly, which are the
    places where most of the time is spent.
    """
    observations, _ = env.reset(seed=seed)
    begins, found, count, timing = np.ones(env.num_envs, bool), [], 0, Timing(env)
    while count < cycles:
        which = np.flatnonzero(begins)
        timing.begin(which)
        found.append(lessons_of(env, plans, observations[which], which))
        count += len(which)
        observations = env.step(actor(observations))[0]
        timing.advance()
        begins = env.brought["emitted"] > 0
    lessons = Lessons(*(np.concatenate(column) for column in zip(*found, strict=True)))
    return lessons._replace(cost=timing.costs())


class Timing:
    """Keeps how long environments take over their texts, from which the cost of a token follows.

    Attributes:
        tokens, seconds: so far, ``[envs]``; the seconds in units of a plain step.
        begun: of the cycles that began together, one column each: environment, tokens and seconds at the beginning, and
            how many tokens further the cost is measured, which is to the end of the text at most.
    """

    def __init__(self, env: ReplayVectorEnv):
        self.env, self.begun = env, list[np.ndarray]()
        self.tokens, self.seconds = np.zeros(env.num_envs), np.zeros(env.num_envs)

    def begin(self, which: np.ndarray) -> None:
        """Note that cycles begin in the environments ``which``."""
        ahead = np.minimum(AHEAD, (self.env.last - self.env.under_way.row)[which])
        self.begun.append(np.stack([which, self.tokens[which], self.seconds[which], ahead]))

    def advance(self) -> None:
        """Add the tokens and the seconds of the last step."""
        self.tokens += self.env.brought["emitted"]
        self.seconds += sum(self.env.brought["seconds"].values()) * self.env.plain[self.env.under_way.clock]

    def costs(self) -> np.ndarray:
        """Return the seconds of a token from the beginning of each cycle on, ``[cycles]``, in units of their mean; 1 for
        cycles that have not ended."""
        which, tokens, seconds, ahead = np.concatenate(self.begun, 1)
        costs = np.ones(len(which), np.float32)
        mean = self.seconds.sum() / max(1, self.tokens.sum())
        for i, (reached, spent) in enumerate(zip(self.tokens, self.seconds, strict=True)):
            own = np.flatnonzero(which == i)
            own = own[tokens[own] < reached]
            until = np.minimum(tokens[own] + ahead[own], reached)
            later = np.interp(until, [*tokens[own], reached], [*seconds[own], spent])
            costs[own] = (later - seconds[own]) / (until - tokens[own]) / mean
        return costs


def lessons_of(env: ReplayVectorEnv, plans: Plans, observations: np.ndarray, which: np.ndarray) -> Lessons:
    """Return the lessons of environments whose cycle has just begun; all tokens cost the same in them.

    Args:
        observations: of them ``[n, …]``.
        which: their indices ``[n]``.
    """
    cycles, row = env.cycles, env.under_way.row[which]
    left = (env.last[which] - row)[:, None]
    seen = np.repeat(observations[:, None], plans.levels, 1)
    if plans.stepwise:
        seen[:, :, : env.control.draft_columns] = cycles.observed[row]
    forwards, beside, further = (
        np.broadcast_to(column, cycles.accepted.shape)[row].astype(np.float32)
        for column in (cycles.forwards, cycles.beside, cycles.further)
    )
    emitted = np.minimum(cycles.accepted[row], left - 1).astype(np.float32)
    accepted = np.minimum(cycles.accepted[row] - beside, left - 1).astype(np.float32)
    begun, cost = env.pending[which].copy(), np.ones(len(which), np.float32)
    return Lessons(seen, accepted, forwards, begun, emitted - accepted, further, cost)
