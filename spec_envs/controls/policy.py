"""The interface of a policy, which decides under a control."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from gymnasium import spaces

from spec_envs.checked import check_number
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.engine import Engine

if TYPE_CHECKING:
    from spec_envs.controls.base import Control


@runtime_checkable
class Predictor(Protocol):
    """Anything that decides by Stable-Baselines3's ``predict``, such as a model of Stable-Baselines3 itself.

    One that reads only some entries of the observation may name them in an attribute ``looks_at``: while it decodes
    (``Policy``), the other entries are not computed, and are 0.
    """

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Return the action and the next recurrent state."""


@runtime_checkable
class Timed(Predictor, Protocol):
    """An agent that knows the seconds of a decision, which are charged for each; those of any other are not."""

    decision_seconds: float


@runtime_checkable
class Learner(Predictor, Protocol):
    """An agent that continues to learn while it is deployed."""

    def record(self, observation: np.ndarray, action: int, reward: float, following: np.ndarray, done: bool) -> Any:
        """Learn from a decision."""


@runtime_checkable
class Trained(Predictor, Protocol):
    """An agent that knows the problem it was made for."""

    control: Control


class Policy:
    """A control and the agent that decides under it: a partner inside another control, or what ``generate`` runs.

    Args:
        learning: makes the agent explore and learn from every cycle.

    Raises:
        TypeError: an agent without ``predict``.
        ValueError: ``learning`` with an agent that cannot learn; an agent that was made for another problem; or
            ``decision_seconds`` that are negative or not a number.
    """

    def __init__(self, control: Control, agent: Predictor, learning: bool = False):
        if isinstance(agent, type) or not isinstance(agent, Predictor):
            raise TypeError(
                f"agent is {agent!r}; expected one of agents.load or agents.AGENTS, or an object with the method predict "
                "of Stable-Baselines3"
            )
        if learning and not isinstance(agent, Learner):
            raise ValueError(
                f"{type(agent).__name__} does not learn while it decodes; rl-adapter, dvi and reinforce do"
            )
        if isinstance(agent, Trained):
            control.check_layout(agent.control, type(agent).__name__)
        self.timed = agent if isinstance(agent, Timed) else None
        check_number("decision_seconds", self.seconds, lambda seconds: seconds >= 0, "seconds, 0 or more")
        self.control, self.agent, self.learning = control, agent, learning
        self.looks_at: Collection[str] | None = None if learning else getattr(agent, "looks_at", None)
        self.state: Any = None
        self.fresh = True

    @property
    def seconds(self) -> float:
        """Seconds that a decision is charged."""
        return self.timed.decision_seconds if self.timed else 0.0

    def reset(self, rng: np.random.Generator, task: str = "") -> None:
        """Begin a new text."""
        self.control.reset(rng, task)
        self.state, self.fresh = None, True

    def decide(self, decoder: Engine) -> int:
        """Observe, choose an action and return it; its time is charged to the clock."""
        observation = self.control.observe(decoder, self.looks_at)
        start = np.array([self.fresh])
        action, self.state = self.agent.predict(observation, self.state, start, deterministic=not self.learning)
        self.fresh, self.observed = False, observation
        decoder.clock.charge("policy", self.seconds)
        return checked_action(self.control.action_space, action)

    def learn(self, decoder: Engine, action: int, cycle: Cycle) -> None:
        """Report to a ``learning`` agent the reward of its last decision: accepted tokens per second, the agent's own
        time not counted."""
        if isinstance(self.agent, Learner):
            reward = cycle.accepted / max(sum(cycle.seconds.values()), 1e-9)
            self.agent.record(self.observed, action, reward, self.control.observe(decoder), decoder.finished)


def checked_action(space: spaces.Discrete, action: Any) -> int:
    """Return an action as a number: a whole number of Python or NumPy, or an array of no dimensions that holds one.

    Raises:
        ValueError: anything else (a fraction, a boolean, a text, an array of one number), or a number out of range.
    """
    if isinstance(action, np.ndarray) and action.shape == ():
        action = action[()]
    whole = isinstance(action, (int, np.integer)) and not isinstance(action, bool)
    if not whole or not 0 <= action < space.n:
        raise ValueError(f"action {action!r} is not in {space}; expected a whole number from 0 to {space.n - 1}")
    return int(action)
