"""Rows of JSON in files that other people wrote."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "validation", "test", "final"]
SPLITS: tuple[Split, Split, Split] = ("train", "validation", "test")
FINAL: Split = "final"  # split of published results, which training, tuning and development never read
NO_JSON = "it is not JSON"


def read_bytes(path: Path, what: str) -> bytes:
    """Return the contents of a file of ``what``, without the byte order mark of UTF-8.

    Raises:
        ValueError: the file cannot be read; the sentence names it.
    """
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError) as error:  # ValueError: the name has a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read the {what} {path}: {reason or error}") from None


def lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers, counted from 1."""
    for number, line in enumerate(data.split(b"\n"), 1):  # not what Unicode calls a line, such as U+2028
        if line.strip():
            yield number, line


def parsed(data: bytes) -> Any:
    """Return the value of JSON in UTF-8; an object that has a key twice becomes NaN, which ``check_values`` refuses.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested so deeply that it cannot be read.
    """
    try:
        return json.loads(data.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # also a number of thousands of digits
        raise ValueError(NO_JSON) from None


def check_values(row: Any) -> None:
    """Refuse a row with NaN or Infinity, which JSON does not have, or with an object that has a key twice.

    Raises:
        ValueError: the row has one of these.
    """
    try:
        json.dumps(row, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError("it has NaN, Infinity or a key twice") from None


def split_of(row: dict[str, Any], text: str) -> str:
    """Return the split that a row states, or else one that depends on ``text`` only.

    Of the texts, six tenths are train, one tenth validation, three tenths test.

    Raises:
        ValueError: the row states a split that does not exist.
    """
    stated = row.get("split")
    if stated is None:
        tenth = zlib.crc32(text.encode()) % 10
        return "train" if tenth < 6 else "validation" if tenth < 7 else "test"
    if stated not in (*SPLITS, FINAL):
        raise ValueError(f"its split is {str(stated)[:40]!r}, expected one of {', '.join((*SPLITS, FINAL))}")
    return str(stated)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    made = dict(pairs)
    return made if len(made) == len(pairs) else float("nan")
