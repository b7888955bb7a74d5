"""Child processes that end with this process, however it ends."""

from __future__ import annotations

import ctypes
import multiprocessing
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
PDEATHSIG = 1  # option of prctl


class Starter:
    """A thread that starts processes and lasts as long as this process.

    Linux can end a process together with the *thread* that started it. A process started from here therefore outlives
    the thread that asked for it.
    """

    def __init__(self) -> None:
        self.todo: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="starter", daemon=True).start()

    def call(self, start: Callable[[], Any]) -> Any:
        """Run ``start`` in the thread, and return its result or raise its error."""
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


def trim() -> None:
    """Return memory that was freed to the system; glibc would keep what building models took."""
    if LIBC is not None:
        LIBC.malloc_trim(0)


_lock = threading.Lock()
_starters: dict[int, Starter] = {}  # by process id: a fork does not have its parent's threads


def started(command: Sequence[str], **settings: Any) -> subprocess.Popen[Any]:
    """Start a process that ends with this one; on systems other than Linux, the caller has to stop it.

    Args:
        settings: further arguments of ``subprocess.Popen``.

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
    libc = LIBC
    process: subprocess.Popen[Any] = starter.call(
        lambda: subprocess.Popen(command, preexec_fn=lambda: _die_with(libc, parent), **settings)
    )
    return process


def _die_with(libc: ctypes.CDLL, parent: int) -> None:
    """Request that the system kills this process when the thread that started it ends.

    It gets SIGKILL instead of SIGTERM, because it has nothing to save and may hang.
    """
    libc.prctl(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before this request
        os._exit(1)


def _forked() -> None:
    """Replace the lock in the child of a fork, which may have been forked while it was held."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def in_worker() -> bool:
    """Return whether siblings of this process share its machine: workers of multiprocessing, or of a Ray cluster."""
    ray = sys.modules.get("ray")
    on_ray = ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    return on_ray or multiprocessing.parent_process() is not None
