"""Check values that others pass in, and refuse them in one sentence where they make no sense."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError


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
