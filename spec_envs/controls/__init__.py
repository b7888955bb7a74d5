"""Control problems by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import Any

from spec_envs import ENVIRONMENTS
from spec_envs.controls.base import Control
from spec_envs.controls.policy import Policy, Predictor

__all__ = ["CONTROLS", "Control", "Policy", "Predictor", "make_control"]


class Controls(Mapping[str, type[Control]]):
    """The control classes of all registered environments, by name. They are also found by an environment's id, and any
    class by its place, ``"module:Class"``."""

    def __getitem__(self, name: str) -> type[Control]:
        place = ENVIRONMENTS.get(name, name)
        if ":" in place:
            return kind_at(place)
        for row in ENVIRONMENTS.values():
            if (kind := kind_at(row)).name == name:
                return kind
        raise KeyError(f"there is no control {name!r}; there are {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        return iter({kind_at(place).name: place for place in ENVIRONMENTS.values()})

    def __len__(self) -> int:
        return len(list(iter(self)))


def kind_at(place: str) -> type[Control]:
    """Return the class of a control.

    Args:
        place: ``"module:Class"``.

    Raises:
        ValueError: nothing is found there, another object, or a control without a name.
    """
    try:
        found = resolve_name(place)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f'no control is found at {place!r}, expected "module:Class": {error}') from error
    if not isinstance(found, type) or not issubclass(found, Control):
        raise ValueError(f"{place} is {found!r}; expected a class derived from spec_envs.controls.Control")
    if not found.name:
        raise ValueError(f'{place} has no name; write name = "…" in the class')
    return found


CONTROLS = Controls()


def make_control(name: str, keywords: dict[str, Any]) -> Control:
    """Return a control, built from the environment's keyword arguments that belong to it.

    Args:
        name: name of the control, an environment's id, or ``"module:Class"``.
    """
    kind = CONTROLS[name]
    own = inspect.signature(kind).parameters
    control = kind(**{key: value for key, value in keywords.items() if key in own})
    control.check_complete()
    return control
