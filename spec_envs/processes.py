"""Processes that end with this one, however that comes about."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PDEATHSIG = 1  # of prctl


class Starter:
    """A thread that starts processes and lasts as long as this process.

    Linux ends a process with the *thread* that started it, if it was asked to. Starting every one from here makes that
    thread outlive whoever wanted it.
    """

    def __init__(self) -> None:
        self.todo: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="starter", daemon=True).start()

    def call(self, start: Callable[[], Any]) -> Any:
        """Return what a call returns, or raise what it raises, in that thread."""
        future: Future[Any] = Future()
        self.todo.put((future, start))
        return future.result()

    def _work(self) -> None:
        while True:
            future, start = self.todo.get()
            try:
                future.set_result(start())
            except BaseException as error:
                future.set_exception(error)


_lock = threading.Lock()
_starters: dict[int, Starter] = {}  # by process: a fork has none of its parent's threads


def started(command: Sequence[str], **settings: Any) -> subprocess.Popen[Any]:
    """Start a process that ends with this one: by itself on Linux, elsewhere only if it is stopped.

    Args:
        settings: of ``subprocess.Popen``.

    Raises:
        OSError: the program cannot be run.
    """
    if LIBC is None:
        return subprocess.Popen(command, **settings)
    with _lock:
        starter = _starters.get(os.getpid())
        if starter is None:
            _starters.clear()
            starter = _starters[os.getpid()] = Starter()
    parent = os.getpid()
    return starter.call(lambda: subprocess.Popen(command, preexec_fn=lambda: _die_with(parent), **settings))


def _die_with(parent: int) -> None:
    """Have the system kill this process when the thread that started it is gone: it has nothing to save, and may hang
    when it is asked to end."""
    assert LIBC is not None
    LIBC.prctl(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be asked
        os._exit(1)


def _forked() -> None:
    """A child of a fork starts processes from a thread of its own, and may have been forked under the lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
