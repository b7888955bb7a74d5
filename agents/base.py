"""The base class of the zoo's agents: Stable-Baselines3's ``predict``, one shape of ``learn``, and the agent's
description."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import gymnasium as gym
import numpy as np

from spec_envs.agents.run import Run
from spec_envs.agents.settings import AgentSettings
from spec_envs.controls.base import Control
from spec_envs.env import SpecEnv


class EnvironmentMemory(NamedTuple):
    """The memory of an agent between the decisions of one of many environments: its own attributes by name, and its
    recurrent state."""

    memory: dict[str, Any]
    state: Any


Source = Literal["nothing", "rewards", "cycles", "trace"]


def checked_control(control: Control, who: str) -> Control:
    """Return a control.

    Raises:
        TypeError: it is an environment.
    """
    if isinstance(control, gym.Env) and isinstance(control.unwrapped, SpecEnv):
        raise TypeError(f"{who} was given the environment {control!r}; expected its control, .unwrapped.control")
    return control


class Agent(ABC):
    """An agent that decides about one observation at a time.

    Args:
        control: the problem that the agent is made for.
        hyperparameters: fields of the agent's own ``Settings``, by name.

    Attributes:
        Settings: the agent's hyper-parameters with their types, ranges, defaults and meanings; a subclass declares its
            own, derived from those of its base class.
        settings: those that this agent was made with.
        decision_seconds: seconds of a decision, charged while it decodes; measured when the agent is made, then kept
            with its weights.
        looks_at: names of the observation's entries that it reads; None reads all. While it decodes, others are not
            made.
        remembers: names of the attributes that hold what it remembers of the decisions before.
        problems: names of the problems that it is made for; empty if it is made for any.
        learns_from: what ``learn`` needs: ``"nothing"``, ``"rewards"`` of the environment, the ``"cycles"`` that are
            decoded in it, or the ``"trace"`` that it replays.
        needs_costs: the agent weighs tokens against the seconds in ``control.costs``.
        charges_training: the seconds of its decisions are charged while it learns.
        validated_by: what a validation measures while the agent learns: its ``"speedup"`` over plain decoding, the
            ``"acceptance"`` of the early exit that it improves, or ``""`` for no validation.
        starts_from: what it can start training from: ``"init"``, weights of another run, or a ``"checkpoint"``.

    Raises:
        TypeError: something else in place of a control.
        ValueError: a hyper-parameter that the agent does not have or a value that it does not take, or a control that
            it cannot decide for.
    """

    Settings: ClassVar[type[AgentSettings]] = AgentSettings
    settings: AgentSettings
    control: Control
    decision_seconds: float = 0.0
    looks_at: Sequence[str] | None = None
    remembers: ClassVar[tuple[str, ...]] = ()
    problems: ClassVar[tuple[str, ...]] = ()
    learns_from: ClassVar[Source] = "rewards"
    needs_costs: ClassVar[bool] = False
    charges_training: ClassVar[bool] = True
    validated_by: ClassVar[Literal["", "speedup", "acceptance"]] = ""
    starts_from: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """Check the class of the hyper-parameters, and show them in the documentation of every agent."""
        if not issubclass(cls.Settings, AgentSettings):
            raise TypeError(
                f"{cls.__name__}.Settings is not derived from AgentSettings; write class Settings(AgentSettings), or "
                "derive it from the Settings of the base class"
            )
        if (own := vars(cls).get("__doc__")) and cls.Settings.model_fields:
            cls.__doc__ = f"{inspect.cleandoc(own)}\n\nHyper-parameters:\n\n{cls.Settings.documentation()}\n"

    def __init__(self, control: Control, **hyperparameters: Any):
        self.control = checked_control(control, type(self).__name__)
        self.settings = self.Settings.read(hyperparameters, type(self).__name__)

    @abstractmethod
    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """Return the action for one observation, and the recurrent state after it.

        Args:
            start: True at the first decision of a text.
        """

    @abstractmethod
    def learn(self, total_timesteps: int, env: Any, run: Run | None = None) -> Self:
        """Train until ``total_timesteps`` environment steps in all, and return the agent.

        Args:
            env: a Gymnasium environment, or a ``ReplayVectorEnv`` where the agent learns from traces.
            run: where checkpoints and logs go, and what is shown; None writes and shows nothing.
        """

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what was learned into a folder."""

    @abstractmethod
    def load(self, folder: str | Path) -> None:
        """Read what ``save`` wrote.

        Raises:
            ValueError: a file is missing, damaged, or belongs to another agent or problem.
        """

    @abstractmethod
    def measure(self) -> float:
        """Return the seconds of a decision, measured here and now."""

    @property
    @abstractmethod
    def priced_seconds(self) -> float:
        """Seconds of a decision under a cost table."""

    def load_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Continue training from the checkpoint in a folder, and return what the caller had saved beside it.

        Raises:
            ValueError: the agent writes no checkpoints that another run could start from, or this one cannot be read.
        """
        raise ValueError(f"{type(self).__name__} does not start from a checkpoint of another run; leave checkpoint out")

    def space(self, trial: Any) -> dict[str, Any]:
        """Return hyper-parameters to try, suggested by an Optuna trial; empty where nothing can be tuned."""
        return {}

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Return the action for one observation, or an action for each of many ``[n, size]``, and the next state.

        Args:
            state: of many environments the one that the last call returned; without it each begins with what the agent
                remembers now. What happens there is remembered there alone.
            episode_start: True where a text begins, or one for each of many ``[n]``.

        Raises:
            ValueError: observations, states or starts of another shape.
        """
        seen, shape = np.asarray(observation), self.control.observation_space.shape
        if seen.shape == shape:
            return self.decide(seen, state, episode_start is not None and bool(np.all(episode_start)), deterministic)
        if shape is None or seen.ndim != 1 + len(shape) or seen.shape[1:] != shape or not len(seen):
            raise ValueError(
                f"the observation has the shape {seen.shape}; {type(self).__name__} was made for {shape}, or several "
                f"of them (n, {', '.join(map(str, shape or ()))}), of {self.control.env_id} with the same settings"
            )
        return self._many(seen, state, episode_start, deterministic)

    def _many(
        self, seen: np.ndarray, state: Sequence[EnvironmentMemory] | None, episode_start: Any, deterministic: bool
    ) -> tuple[np.ndarray, list[EnvironmentMemory]]:
        """Decide for one environment after the other, each with its own memory, and return the result of
        ``predict``."""
        starts = np.zeros(len(seen), bool) if episode_start is None else np.asarray(episode_start, bool)
        if starts.shape != (len(seen),):
            raise ValueError(
                f"episode_start has the shape {starts.shape}; expected ({len(seen)},), as many as observations"
            )
        memories = [EnvironmentMemory(self._memory(), None) for _ in seen] if state is None else list(state)
        if len(memories) != len(seen) or not all(isinstance(memory, EnvironmentMemory) for memory in memories):
            raise ValueError(
                f"state is not that of {len(seen)} environments; expected what predict returned before, or None"
            )
        own = {name: getattr(self, name) for name in self.remembers}
        actions, following = [], []
        try:
            for one, memory, start in zip(seen, memories, starts.tolist(), strict=True):
                vars(self).update(memory.memory)
                action, after = self.decide(one, memory.state, start, deterministic)
                actions.append(int(action))
                following.append(EnvironmentMemory({name: getattr(self, name) for name in self.remembers}, after))
        finally:
            vars(self).update(own)
        return np.array(actions), following

    def _memory(self) -> dict[str, Any]:
        """Return a copy of what is remembered now, for an environment to begin with."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.remembers}
