"""Base classes of agents that follow a rule."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field

from spec_envs.agents.base import Agent, Source, checked_control
from spec_envs.agents.run import Run
from spec_envs.agents.settings import AgentSettings, Amount
from spec_envs.controls import CONTROLS
from spec_envs.controls.base import Control, environment_id


class Rule(Agent):
    """An agent without anything to train. Its memory lasts from text to text.

    Raises:
        ValueError: a control of another problem, or one whose observation lacks what the rule reads.
    """

    learns_from: ClassVar[Source] = "nothing"
    looks_at: tuple[str, ...] | None = None

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        if self.problems and control.name not in self.problems:
            known = " or ".join(environment_id(CONTROLS[name]) for name in self.problems)
            raise ValueError(f"{type(self).__name__} controls {known}, not {control.env_id}")
        if missing := set(self.looks_at or ()) - set(control.slices):
            raise ValueError(
                f"{type(self).__name__} looks at {', '.join(sorted(missing))}, which the observation "
                f'{control.observation!r} lacks here; pass observation="default", and no adjustment_interval'
            )

    @property
    def priced_seconds(self) -> float:
        """Seconds of a decision under a cost table; a rule's are next to none."""
        return 0.0

    def measure(self) -> float:
        """Return 0: a rule takes next to no time."""
        return 0.0

    def learn(self, total_timesteps: int, env: Any, run: Run | None = None) -> Self:
        """Return the rule unchanged, because it has nothing to learn."""
        return self

    def save(self, folder: str | Path) -> None:
        """Write nothing: the run's configuration is all there is."""

    def load(self, folder: str | Path) -> None:
        """Read nothing."""

    def read(self, observation: np.ndarray, name: str) -> float:
        """Return the first number of an entry of the observation."""
        return float(observation[self.control.slices[name].start])


class ChainRule(Rule):
    """A published rule for the length of a chain.

    Attributes:
        decision: when it decides, ``"cycle"`` or ``"token"``.
        k_max: tokens of the longest chain.

    Raises:
        ValueError: a control that decides at other times.
    """

    problems = ("k",)
    decision: ClassVar[str]
    looks_at: tuple[str, ...]

    def __init__(self, control: Control, **hyperparameters: Any):
        found = "token" if checked_control(control, type(self).__name__).progress else "cycle"
        if control.name not in self.problems or found != self.decision:
            given = f'with decision="{found}"' if control.name in self.problems else f"of {control.env_id}"
            raise ValueError(
                f'{type(self).__name__} needs a control of SpecK-v0 with decision="{self.decision}", not one {given}'
            )
        super().__init__(control, **hyperparameters)
        self.k_max = control.max_depth + 1


class LengthRule(ChainRule):
    """A rule that moves K after every decision by the acceptance of the last chain."""

    class Settings(AgentSettings):
        k: Amount = Field(description="first length")

    settings: Settings
    decision = "cycle"
    remembers: ClassVar[tuple[str, ...]] = ("k",)

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.k = self.settings.k

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        if not start and self.read(observation, "last_k"):  # there was a last chain
            self.update(self.read(observation, "last_acceptance"), observation)
        return int(np.clip(round(self.k), 0, self.k_max)), state

    @abstractmethod
    def update(self, accepted: float, observation: np.ndarray) -> None:
        """Move ``k`` after a chain of which the share ``accepted`` was accepted."""


class StopRule(ChainRule):
    """A rule that drafts until it expects too little of the next token.

    The published rules weigh a forward of the draft model; a token that is copied for nothing is not theirs to weigh.
    """

    class Settings(AgentSettings):
        copy_threshold: Amount = Field(
            0.1,
            description="least product of a chain's probabilities at which it continues by copying; above 1 it never does",
        )

    settings: Settings
    decision = "token"

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        if self.read(observation, "drafted") == 0:
            self.begin(observation)
            return 1, state
        stops = self.stops(observation)
        if self.read(observation, "free"):
            stops = self.read(observation, "path") < self.settings.copy_threshold
        return int(not stops), state

    def begin(self, observation: np.ndarray) -> None:
        """Begin a cycle, whose first token is always drafted."""

    @abstractmethod
    def stops(self, observation: np.ndarray) -> bool:
        """Return whether to verify what is drafted."""

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {"copy_threshold": trial.suggest_float("copy_threshold", 0.02, 0.5, log=True)}
