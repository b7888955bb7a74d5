"""Say what is waited for, where it takes longer than a user expects."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import BaseFileLock

PATIENCE = 2.0  # seconds


@contextmanager
def announced(log: logging.Logger, message: str, *arguments: object) -> Iterator[None]:
    """Log a message if the block takes longer than ``PATIENCE``."""
    timer = threading.Timer(PATIENCE, log.warning, (message, *arguments))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def turn(lock: BaseFileLock, log: logging.Logger, message: str, *arguments: object) -> Iterator[None]:
    """Hold a lock; log a message if another process holds it for longer than ``PATIENCE``."""
    with announced(log, message, *arguments):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
