"""Files that are written whole or not at all, and folders that one process at a time writes in."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOG = logging.getLogger(__name__)
DATA = Path(__file__).resolve().parent / "data"  # shipped with the package
LOCK = ".lock"  # name of the file in a held folder
TEMPORARY = ".tmp"


@contextmanager
def held(folder: Path, doing: str = "") -> Iterator[None]:
    """Hold a folder: no other process holds it until the block ends or this process dies, in whatever way.

    The folder is made if it does not exist, temporary files that a killed process left in it are removed, and at the
    end it is removed if nothing was written in it. The lock is the operating system's on an open file, whose text only
    serves error messages. It is not reentrant.

    Args:
        doing: what processes that hold the folder do there, such as "recording a trace". With it, this process logs
            that it waits, and waits for the other one; without it, an error is raised.

    Raises:
        ValueError: another process holds the folder, and ``doing`` is empty.
        OSError: the folder cannot be made; the sentence names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"could not make the folder {folder}: {error.strerror}; choose another folder") from None
    note = folder / LOCK
    lock = FileLock(note, fallback_to_soft=False)  # a soft lock outlives its process
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if not doing:
            raise ValueError(
                f"{folder} is in use by {holder(note)}; wait until it has ended, or choose another folder"
            ) from None
        LOG.warning("waiting for %s, which is %s in %s", holder(note), doing, folder)
        folder.mkdir(parents=True, exist_ok=True)  # the other process may have removed it
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
    """Return the name of the process that holds a folder, as its lock file states it."""
    try:
        return note.read_text()[:200] or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that is renamed to ``path`` when the block ends, and removed if it fails.
    A folder that is missing is made.

    A power loss leaves either the old file or the new one, because the contents are on the disk before the renaming.

    Raises:
        OSError: the file could not be written (a full disk, say); the sentence names it.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        temporary.replace(path)
        with suppress(OSError):  # some network file systems cannot flush a folder
            flush(path.parent)
    except BaseException as error:  # KeyboardInterrupt too: clean up, then raise on
        temporary.unlink(missing_ok=True)
        reported = isinstance(error, OSError) and error.errno is None  # by a block within this one, for another file
        if not reported and (isinstance(error, OSError) or "(os error" in str(error)):  # the latter from safetensors
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise OSError(f"could not write {path}: {reason}; free some space or choose another folder") from error
        raise


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
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
    """Return whether there is such a file; False for a name that no file system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def at_home(source: str | Path) -> Path:
    """Return a path with ``~`` replaced by the home folder; the ``~name`` of an unknown user stays as it is."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def find_json(source: str, folder: Path, what: str, *others: str) -> Path:
    """Return the path of a JSON file.

    Args:
        source: bare name of a file in ``folder``, or a path.
        folder: of the shipped files.
        what: the file describes, for the error.
        others: further names that the caller accepts, listed in the error.

    Raises:
        ValueError: there is no such file.
    """
    for path in (folder / f"{source}.json", Path(source)):
        if is_file(path):
            return path
    names = ", ".join([*others, *sorted(path.stem for path in folder.glob("*.json"))])
    raise ValueError(f"no {what} {source!r}: expected a JSON file, or one of {names}")


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all.

    Raises:
        ValueError: the data has NaN or an infinity, which JSON does not have.
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
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON, has NaN or an infinity, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def finite(text: str) -> float:
    """Return the number that a JSON text states.

    Raises:
        ValueError: it is NaN or an infinity, which Python's reader accepts.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def read_json(path: Path, remedy: str) -> Any:
    """Return the value of a JSON file.

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
