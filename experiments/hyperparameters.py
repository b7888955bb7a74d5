"""Checks of what stands under ``hyperparameters:`` of a stanza, by what an agent's constructor says of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from spec_envs.agents.exits.online import OnlineAgent
from spec_envs.agents.registry import AGENTS
from spec_envs.agents.sb3.agent import ALGORITHMS, RESERVED, SB3Agent
from spec_envs.agents.selector.adapter import Settings
from spec_envs.agents.traced.base import TracedAgent

SHARES = {"gamma", "gae_lambda", "tau", "exploration_fraction", "exploration_initial_eps", "exploration_final_eps"}


@functools.cache
def constructors(agent: str) -> tuple[Callable[..., Any], ...]:
    """The classes whose constructors an agent's hyper-parameters go to, first its own."""
    kinds: list[Callable[..., Any]] = [SB3Agent if agent in ALGORITHMS else AGENTS[agent]]
    if agent in ALGORITHMS:
        kinds.append(ALGORITHMS[agent])
    if agent in ("dvi", "reinforce"):
        kinds.append(OnlineAgent)
    if agent in ("hindsight", "exact-pg"):
        kinds.append(TracedAgent)
    if agent == "rl-adapter":
        kinds.append(Settings)
    return tuple(kinds)


def check_value(agent: str, name: str, value: Any) -> None:
    """Refuse a hyper-parameter of the wrong type or out of range.

    Raises:
        ValueError: the sentence says what was expected.
    """
    for kind in constructors(agent):
        parameter = inspect.signature(kind).parameters.get(name)
        if parameter is None:
            continue
        hints = get_type_hints(kind.__init__, localns={"VecEnv": Any})  # type: ignore[misc]
        wanted = hints.get(name, Any)
        try:
            TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
                as_tuples(value), strict=True
            )
        except ValidationError:
            raise ValueError(f"{name} is {value!r}; expected {inspect.formatannotation(wanted)}") from None
        if not isinstance(value, int | float) or isinstance(value, bool):
            return
        default = parameter.default
        if value < 0 and not (isinstance(default, int | float) and default < 0):
            raise ValueError(f"{name} is {value!r}; expected a number of 0 or more")
        if name in SHARES and value > 1:
            raise ValueError(f"{name} is {value!r}; expected a share from 0 to 1")
        return


def as_tuples(value: Any) -> Any:
    """Lists, which is all that YAML has, as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def check_name(agent: str, name: str, nearest: Callable[[str, Any], str]) -> None:
    """Refuse a hyper-parameter that an agent does not have.

    Raises:
        ValueError: the sentence names the nearest one, or all.
    """
    known = known_hyperparameters(agent)
    if name not in known:
        hint = nearest(name, known) or f"; there are {', '.join(sorted(known))}" if known else "; it has none"
        raise ValueError(f"unknown hyper-parameter {name!r} of {agent}{hint}")


def parameters(name: str) -> set[str]:
    known = {p for kind in constructors(name) for p in inspect.signature(kind).parameters}
    return (
        known - RESERVED - {"outputs", "activation"}
        | ({"learning_rate", "activation"} if name in ALGORITHMS else set())
        | ({"learning_rate"} & known)
        | ({"seed"} & known)
    )


def known_hyperparameters(name: str) -> set[str]:
    """What may stand under ``hyperparameters:`` for an agent."""
    own = {"control", "algorithm", "hyperparameters", "online", "seed", "total_timesteps"}
    return parameters(name) - own


def set_by_run(agent: str, seed: int, total_timesteps: int) -> dict[str, int]:
    """Return those hyper-parameters of an agent that its run sets."""
    given = {"seed": seed, "total_timesteps": total_timesteps}
    return {name: value for name, value in given.items() if name in parameters(agent)}
