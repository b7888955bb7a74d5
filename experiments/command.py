"""Behaviour that all commands share: errors in one sentence, exit statuses, the package's log on stderr, and stages, each
announced in one line that says what begins, why, and about how long it takes."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

LOG = logging.getLogger(__name__)

COSTS, RECORDING, WRITING, TRAINING, STATIC, TABLE = "costs", "recording", "writing", "training", "static", "table"

Announce = Callable[[str], None]
"""Tells the user what begins now."""


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, with which a cluster ends a process, so that it ends as if it were interrupted."""


class Lines(logging.Handler):
    """Prints messages unchanged to the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def one_sentence(interrupted: str = "interrupted") -> Iterator[None]:
    """Turn errors that a user can correct into one sentence and exit status 1, and Ctrl-C and SIGTERM into the sentence
    ``interrupted`` and the statuses that shells use, 130 and 143. The package's log goes to stderr."""
    try:
        with terminable(), logged():
            yield
    except BrokenPipeError:  # nobody reads what is printed: the command ``spec-envs`` ends quietly
        raise
    except OSError as error:  # without a file name it comes from a library that could not write, on a full disk
        remedy = "" if error.filename or error.errno is None else "; free some space, or choose another folder"
        sys.exit(f"error: {error}{remedy}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        print(interrupted, file=sys.stderr)
        sys.exit(143 if isinstance(error, Terminated) else 130)


@contextmanager
def logged() -> Iterator[None]:
    """Print the package's log messages to stderr while the block runs, one line each."""
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
    """Raise ``Terminated`` on SIGTERM while the block runs, unless SIGTERM is handled already."""

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


class Stages:
    """Numbers the stages of a command, such as ``[2/4] training ppo``.

    Attributes:
        names: of all stages in order; those that are done already are left out.
    """

    def __init__(self, names: Sequence[str] = ()):
        self.names = list(names)

    def begin(self, name: str, doing: str) -> None:
        """Announce that a stage begins, if it is one of ``names``."""
        if name in self.names:
            LOG.info(f"[{self.names.index(name) + 1}/{len(self.names)}] {doing}")


def about(seconds: float) -> str:
    """Return a duration in words, as roughly as it is known: ``"about 20 s"``, ``"about 3 min"``."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {round(seconds, -1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
