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
            found: type[Control] = resolve_name(place)
            return found
        kinds: list[type[Control]] = [resolve_name(row) for row in ENVIRONMENTS.values()]
        for kind in kinds:
            if kind.name == name:
                return kind
        raise KeyError(f"there is no control {name!r}; there are {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        return iter({resolve_name(place).name: place for place in ENVIRONMENTS.values()})

    def __len__(self) -> int:
        return len(list(iter(self)))


CONTROLS = Controls()


def make_control(name: str, keywords: dict[str, Any]) -> Control:
    """Return a control, built from the environment's keyword arguments that belong to it.

    Args:
        name: name of the control, an environment's id, or ``"module:Class"``.
    """
    kind = CONTROLS[name]
    own = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in keywords.items() if key in own})
