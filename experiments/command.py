"""Commands end with their result, or with one sentence; the package's log is printed meanwhile."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which a cluster ends a process: it ends like one that was interrupted."""


class Lines(logging.Handler):
    """Prints messages unchanged to the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def one_sentence(interrupted: str = "interrupted") -> Iterator[None]:
    """Turn what a user can mend into a sentence and an exit status of 1, and Ctrl-C and SIGTERM into a sentence and the
    status that shells have for them, 130 and 143. What the package logs goes to stderr."""
    try:
        with terminable(), logged():
            yield
    except OSError as error:  # of a library that writes a file, and does not name it, on a full disk
        whose = "" if error.filename or error.errno is None else "; free some space, or choose another folder"
        sys.exit(f"error: {error}{whose}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        print(interrupted, file=sys.stderr)
        sys.exit(143 if isinstance(error, Terminated) else 130)


@contextmanager
def logged() -> Iterator[None]:
    """While the block runs, what the package logs is printed to stderr, a line each."""
    package, handler = logging.getLogger("spec_envs"), Lines()
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


@contextmanager
def terminable() -> Iterator[None]:
    """While the block runs, SIGTERM raises ``Terminated``, unless something else listens to it."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
