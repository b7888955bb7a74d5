"""Stable-Baselines3's ``predict``, for one observation or for those of many environments."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from spec_envs.controls.base import Control


class Place(NamedTuple):
    """What an agent carries from decision to decision of one of many environments: what it remembers itself, by the
    names of attributes, and its recurrent state."""

    memory: dict[str, Any]
    state: Any


class Deciding(ABC):
    """An agent that decides about one observation at a time.

    Attributes:
        control: the problem.
        remembers: names of the attributes that hold what it remembers of the decisions before.
    """

    control: Control
    remembers: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """Return the action for one observation, and the recurrent state behind it.

        Args:
            start: whether this is the first decision of a text.
        """

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Return the action for one observation, or an action for each of many ``[n, size]``, and the next state.

        Args:
            state: of many environments the one that the last call returned; without it each begins with what the agent
                remembers now. What happens there is remembered there alone.
            episode_start: whether a text begins, or for each of many ``[n]``.

        Raises:
            ValueError: observations, states or starts of another shape.
        """
        seen, shape = np.asarray(observation), self.control.observation_space.shape
        if seen.shape == shape:
            return self.decide(seen, state, episode_start is not None and bool(np.all(episode_start)), deterministic)
        if shape is None or seen.ndim != 1 + len(shape) or seen.shape[1:] != shape or not len(seen):
            raise ValueError(
                f"the observation has the shape {seen.shape}; {type(self).__name__} was made for {shape}, or several of them "
                f"(n, {', '.join(map(str, shape or ()))}), of {self.control.name} with the same settings"
            )
        return self._many(seen, state, episode_start, deterministic)

    def _many(
        self, seen: np.ndarray, state: Sequence[Place] | None, episode_start: Any, deterministic: bool
    ) -> tuple[np.ndarray, list[Place]]:
        """One environment after the other, each with what was remembered in it."""
        starts = np.zeros(len(seen), bool) if episode_start is None else np.asarray(episode_start, bool)
        if starts.shape != (len(seen),):
            raise ValueError(
                f"episode_start has the shape {starts.shape}; expected ({len(seen)},), as many as observations"
            )
        places = [Place(self._memory(), None) for _ in seen] if state is None else list(state)
        if len(places) != len(seen) or not all(isinstance(place, Place) for place in places):
            raise ValueError(
                f"state is not that of {len(seen)} environments; expected what predict returned before, or None"
            )
        own = {name: getattr(self, name) for name in self.remembers}
        actions, following = [], []
        try:
            for one, place, start in zip(seen, places, starts.tolist(), strict=True):
                vars(self).update(place.memory)
                action, after = self.decide(one, place.state, start, deterministic)
                actions.append(int(action))
                following.append(Place({name: getattr(self, name) for name in self.remembers}, after))
        finally:
            vars(self).update(own)
        return np.array(actions), following

    def _memory(self) -> dict[str, Any]:
        """Return what another environment begins with."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.remembers}
