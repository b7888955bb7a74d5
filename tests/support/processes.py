"""Checks of processes, a mark for tests that need a llama-server, and files that cannot grow."""

from __future__ import annotations

import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_llama_server = pytest.mark.skipif(
    shutil.which("llama-server") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="no llama-server on PATH, and the wheel is for Linux on x86-64",
)


def alive(process: int) -> bool:
    """Return True if a process of this id exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit files to this many bytes, so that writing fails half way as on a full disk.

    This is not a fixture because pytest writes its progress, perhaps to a file, before it tears fixtures down.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
