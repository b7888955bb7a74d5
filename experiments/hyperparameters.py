"""Checks of the ``hyperparameters:`` of a stanza against the declarations of an agent's constructor."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from spec_envs.agents import AGENTS

SHARES = {"gamma", "gae_lambda", "tau", "exploration_fraction", "exploration_initial_eps", "exploration_final_eps"}
SET_BY_RUN = ("seed", "total_timesteps")
NOT_SETTINGS = {"self", "control", "algorithm", *SET_BY_RUN}


class Declared(NamedTuple):
    """A hyper-parameter as its constructor declares it."""

    wanted: Any
    default: Any


@functools.cache
def parameters(agent: str) -> dict[str, Declared]:
    """Return every keyword argument of an agent by name, those included that its run sets."""
    kind, found = AGENTS[agent], dict[str, Declared]()
    for number, constructor in enumerate(kind.constructors()):
        hints = get_type_hints(constructor, localns={"VecEnv": Any})
        for name, parameter in inspect.signature(constructor).parameters.items():
            named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if named and name not in found and not (number and name in kind.reserved):
                found[name] = Declared(hints.get(name, Any), parameter.default)
    return found


def known_hyperparameters(agent: str) -> set[str]:
    """Return the names that ``hyperparameters:`` of an agent may hold."""
    return set(parameters(agent)) - NOT_SETTINGS


def set_by_run(agent: str, seed: int, total_timesteps: int) -> dict[str, int]:
    """Return those hyper-parameters of an agent that its run sets."""
    given = {"seed": seed, "total_timesteps": total_timesteps}
    return {name: value for name, value in given.items() if name in parameters(agent)}


def check_value(agent: str, name: str, value: Any) -> None:
    """Refuse a hyper-parameter of the wrong type or out of range.

    Raises:
        ValueError: the message names what was expected.
    """
    wanted, default = parameters(agent)[name]
    try:
        adapter = TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(as_tuples(value), strict=True)
    except ValidationError:
        raise ValueError(f"{name} is {value!r}; expected {inspect.formatannotation(wanted)}") from None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if value < 0 and not (isinstance(default, int | float) and default < 0):
        raise ValueError(f"{name} is {value!r}; expected a number of 0 or more")
    if name in SHARES and value > 1:
        raise ValueError(f"{name} is {value!r}; expected a share from 0 to 1")


def as_tuples(value: Any) -> Any:
    """Return lists, which is all that YAML has, as tuples."""
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
