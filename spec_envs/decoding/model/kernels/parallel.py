"""How many threads compute: as many as torch uses, and one in a forked process.

OpenMP's threads do not live on in a forked process, where a computation on several of them would wait for ever; torch
and the kernels share them.
"""

from __future__ import annotations

import os
import sys

import torch

ORIGIN = os.getpid()


def threads() -> int:
    """Threads of a kernel."""
    return torch.get_num_threads() if os.getpid() == ORIGIN else 1


if sys.platform != "win32":
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
