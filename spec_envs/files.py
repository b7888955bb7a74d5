"""Files that are there whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends, and is removed if it fails.

    Raises:
        OSError: the file could not be written (a full disk, say); the sentence names it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:  # KeyboardInterrupt too: clean up, then raise on
        temporary.unlink(missing_ok=True)
        told = isinstance(error, OSError) and error.errno is None  # of another file, by a block within this one
        if not told and (isinstance(error, OSError) or "(os error" in str(error)):  # the latter from safetensors
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise OSError(f"could not write {path}: {reason}; free some space or choose another folder") from error
        raise


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write bytes whole or not at all."""
    with whole(path) as temporary:
        temporary.write_bytes(data)


def write_torch(path: Path, state: Any) -> None:
    """``torch.save``, whole or not at all; by way of memory, for torch itself does not say why it could not write."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getbuffer())


def is_file(path: Path) -> bool:
    """Whether there is such a file; there is none of a name that no file system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def at_home(source: str | Path) -> Path:
    """Return a path with ``~`` as the home folder; that of nobody known stays as it is."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def find_json(source: str, folder: Path, what: str, *others: str) -> Path:
    """The JSON file ``source``: one of a shipped folder by its bare name, or any by its path. ``others``: names that
    mean something else to who asks.

    Raises:
        ValueError: there is none.
    """
    for path in (folder / f"{source}.json", Path(source)):
        if is_file(path):
            return path
    names = ", ".join([*others, *sorted(path.stem for path in folder.glob("*.json"))])
    raise ValueError(f"no {what} {source!r}: expected a JSON file, or one of {names}")


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")
