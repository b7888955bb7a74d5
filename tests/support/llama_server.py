"""A mark for tests that need a llama-server."""

from __future__ import annotations

import platform
import shutil
import sys

import pytest

needs_llama_server = pytest.mark.skipif(
    shutil.which("llama-server") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="no llama-server on PATH, and the wheel is for Linux on x86-64",
)
