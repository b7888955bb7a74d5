"""Find a llama-server, and check that its process is alive."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

import pytest

needs_llama_server = pytest.mark.skipif(
    shutil.which("llama-server") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="no llama-server on PATH, and the wheel is for Linux on x86-64",
)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
