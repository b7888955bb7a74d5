"""Hyper-parameters of agents: each agent declares a frozen model of its own, which refuses a value in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Self, TypeVar

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spec_envs.checked import in_words
from spec_envs.settings import plain

T = TypeVar("T")
Natural = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
Amount = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]


class UnfitSetting(ValueError):
    """A hyper-parameter that an agent does not have, or a value that it does not take.

    Attributes:
        name: the hyper-parameter.
    """

    def __init__(self, name: str, message: str):
        super().__init__(name, message)  # both, because unpickling passes them again
        self.name = name

    def __str__(self) -> str:
        return str(self.args[1])


class AgentSettings(BaseModel):
    """The hyper-parameters of an agent by name, with their types, ranges, defaults and meanings."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )

    @classmethod
    def read(cls, given: Mapping[str, Any], agent: str, reserved: Collection[str] = ()) -> Self:
        """Return the hyper-parameters, given those that differ from the defaults; lists become tuples.

        Args:
            agent: the agent's name, for the sentence of an error.
            reserved: names that are not offered there, because somebody else sets them.

        Raises:
            UnfitSetting: a name that the agent does not have (the nearest one is named), or a value that it does not
                take.
        """
        names = sorted(set(cls.model_fields) - set(reserved))
        for name in given:
            if name not in cls.model_fields:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                known = f"there are {', '.join(names)}" if names else "it has none"
                hint = f" (did you mean {near[0]!r}?)" if near else f"; {known}"
                raise UnfitSetting(name, f"unknown hyper-parameter {name!r} of {agent}{hint}")
        try:
            return cls(**{name: as_tuples(plain(value)) for name, value in given.items()})
        except ValidationError as error:
            first = error.errors()[0]
        if not first["loc"]:  # what a validator of several values together refuses
            raise UnfitSetting("", first["msg"].removeprefix("Value error, "))
        name = str(first["loc"][0])
        found = f"is {given[name]!r}" if name in given else "is missing"
        raise UnfitSetting(name, f"{name} {found}; expected {cls.expected(name)}")

    @classmethod
    def expected(cls, name: str) -> str:
        """Return in words what a hyper-parameter takes."""
        field = cls.model_fields[name]
        return field.title or in_words(field.rebuild_annotation())

    @classmethod
    def documentation(cls) -> str:
        """Return a list in Markdown of the hyper-parameters: defaults, what they take, and what they mean."""
        rows = []
        for name, field in cls.model_fields.items():
            default = "" if field.is_required() else f"={field.default!r}"
            rows.append(f"- `{name}{default}`: {cls.expected(name)}; {field.description}.")
        return "\n".join(rows)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls.__doc__ = f"The hyper-parameters.\n\n{cls.documentation()}\n"


class SeededSettings(AgentSettings):
    """The hyper-parameters of an agent that draws random numbers."""

    seed: Natural = Field(0, description="seed of everything that the agent draws")


def choices(own: T, *others: T) -> tuple[T, ...]:
    """Return values to choose from in tuning: an agent's own one, and those of the others that differ from it."""
    return tuple(dict.fromkeys((own, *others)))


def as_tuples(value: Any) -> Any:
    """Return lists, which is all that YAML has, and ranges as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | range) else value
