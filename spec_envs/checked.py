"""Check values that others pass in, and refuse them in one sentence where they make no sense."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


class Checked(BaseModel):
    """Data of a file: no unknown keys, no numbers in quotes, nothing infinite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def first_error(error: ValidationError) -> str:
    """Return place and reason of the first thing that is wrong."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")


def read_checked(kind: type[Any], path: Path, what: str, expected: str) -> Any:
    """Return what a JSON file holds, as ``kind``.

    Raises:
        ValueError: it cannot be read, or holds something else; the message names what was ``expected``.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        reason = first_error(error)
    except OSError as error:
        reason = error.strerror or str(error)
    raise ValueError(f"{path} is not {what} ({reason}); {expected}")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and not a boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    size: Any = abs(value)
    return bool(size <= sys.float_info.max)  # False for NaN


def check_number(name: str, value: Any, fits: Callable[[Any], bool], expected: str) -> None:
    """Refuse a value that is not a finite number, or does not fit.

    Raises:
        ValueError: the message names what was ``expected``.
    """
    if not is_number(value) or not fits(value):
        raise ValueError(f"{name} is {value if is_number(value) else repr(value)}; expected {expected}")


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuse a value outside a short list.

    Raises:
        ValueError: the sentence lists what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, allowed))}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean …?)" with the most similar known word, or an empty text if none is similar."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def in_words(hint: Any) -> str:
    """Return a type and its range in words, such as "a number from 0 to 1"."""
    if get_origin(hint) is Annotated:
        kind, *bounds = get_args(hint)
        if NoneType in get_args(kind):
            number: Any = Union[tuple(k for k in get_args(kind) if k is not NoneType)]  # noqa: UP007
            return f"{in_words(number)}{range_of(bounds)} or null"
        return f"{in_words(kind)}{range_of(bounds)}"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if get_origin(hint) in (Union, UnionType):
        kinds = dict.fromkeys(map(in_words, get_args(hint)))
        return " or ".join(
            sorted(kinds, key=lambda kind: kind.startswith("a list"))
        )  # what follows a list would read as its entries
    if get_origin(hint) in (tuple, list, Sequence):
        return f"a list, each entry {in_words(get_args(hint)[0])}"
    if get_origin(hint) is Callable:
        return "a function"
    if get_origin(hint) is dict:
        return "keys and values"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return f"a {hint.__name__.lower()}"
    return WORDS.get(hint, inspect.formatannotation(hint))


def range_of(bounds: list[Any]) -> str:
    """Return bounds of a number in words, beginning with a space; nothing where there are none."""
    words = {"ge": " of {} or more", "gt": " above {}", "le": " up to {}", "lt": " below {}"}
    found = {name: value for bound in bounds for name, value in asdict(bound).items()}
    if {"ge", "le"} <= set(found):
        return f" from {found['ge']} to {found['le']}"
    return "".join(words[name].format(value) for name, value in found.items())
