"""The number of threads of a kernel: as many as torch uses, and one in a forked process.

torch and the kernels share OpenMP's threads. These do not exist in a forked process, where a computation on several
threads would wait for them forever.
"""

from __future__ import annotations

import os
import sys

import torch

ORIGIN = os.getpid()


def threads() -> int:
    """Return the number of threads with which a kernel computes."""
    return torch.get_num_threads() if os.getpid() == ORIGIN else 1


if sys.platform != "win32":
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
