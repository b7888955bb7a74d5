"""Files that are there whole or not at all, and folders that one process at a time writes in."""

from __future__ import annotations

import json
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

DATA = Path(__file__).resolve().parent / "data"  # what is shipped
LOCK = ".lock"  # in a folder that is held
TEMPORARY = ".tmp"


@contextmanager
def held(folder: Path, doing: str = "") -> Iterator[None]:
    """Hold a folder: until the block ends, or this process dies however it dies, no other process holds it.

    The folder is made where there is none, temporary files that a killed process left in it are removed, and at the end
    it is removed if nothing was written in it. The lock is the operating system's on an open file: what the file says
    serves the message alone. It is not reentrant.

    Args:
        doing: what whoever holds the folder does there, such as "recording a trace": a line then says so, and this
            process waits for it. Without it this process is refused.

    Raises:
        ValueError: another process holds the folder, and ``doing`` is empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / LOCK
    lock = FileLock(note, fallback_to_soft=False)  # a soft lock outlives its process
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not doing:
            raise ValueError(
                f"{folder} is in use by {holder(note)}; wait until it has ended, or choose another folder"
            ) from None
        print(f"waiting for {holder(note)}, which is {doing} in {folder}", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)  # who held it may have removed it
        lock.acquire(poll_interval=0.2)
    try:
        with suppress(OSError):  # a full disk is reported by what is written there
            note.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        for left in folder.glob(f"*{TEMPORARY}"):
            left.unlink(missing_ok=True)
        yield
    finally:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [LOCK]:
            note.unlink()
            folder.rmdir()
        lock.release()


def holder(note: Path) -> str:
    """Return what the lock file of a folder says of the process that holds it."""
    try:
        return note.read_text()[:200] or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends, and is removed if it fails. A power loss
    leaves the old file or the new one: what was written is on the disk before it takes the name.

    Raises:
        OSError: the file could not be written (a full disk, say); the sentence names it.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        with suppress(OSError):  # of folders some network file systems refuse it
            flush(path.parent)
    except BaseException as error:  # KeyboardInterrupt too: clean up, then raise on
        temporary.unlink(missing_ok=True)
        told = isinstance(error, OSError) and error.errno is None  # of another file, by a block within this one
        if not told and (isinstance(error, OSError) or "(os error" in str(error)):  # the latter from safetensors
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise OSError(f"could not write {path}: {reason}; free some space or choose another folder") from error
        raise


def flush(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write bytes whole or not at all."""
    with whole(path) as temporary:
        temporary.write_bytes(data)


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
    """Write JSON whole or not at all.

    Raises:
        ValueError: a number that JSON does not have (NaN or an infinity).
        OSError: the file could not be written.
    """
    try:
        text = json.dumps(data, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"could not write {path}: {error}; expected finite numbers, or null for what is not known"
        ) from None
    with whole(path) as temporary:
        temporary.write_text(text + "\n")


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: it is not JSON, holds NaN or an infinity, or is nested deeper than any of our files.
    """
    try:
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def finite(text: str) -> float:
    """Return a number that a JSON text holds; NaN and infinities, which Python's reader takes, are refused."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def read_json(path: Path, remedy: str) -> Any:
    """Return what a JSON file holds.

    Args:
        remedy: what to do about a damaged file, such as "delete it to measure again".

    Raises:
        ValueError: the file cannot be read or is damaged; the sentence names it and ends with ``remedy``.
    """
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); {remedy}") from None
