"""Types of settings in words, for the sentences of errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def in_words(hint: Any) -> str:
    """Return a type and its range in words, such as "a number from 0 to 1"."""
    if get_origin(hint) is Annotated:
        kind, *bounds = get_args(hint)
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
    return WORDS.get(hint, inspect.formatannotation(hint))


def range_of(bounds: list[Any]) -> str:
    """Return bounds of a number in words, beginning with a space; nothing where there are none."""
    words = {"ge": " of {} or more", "gt": " above {}", "le": " up to {}", "lt": " below {}"}
    found = {name: value for bound in bounds for name, value in asdict(bound).items()}
    if {"ge", "le"} <= set(found):
        return f" from {found['ge']} to {found['le']}"
    return "".join(words[name].format(value) for name, value in found.items())
