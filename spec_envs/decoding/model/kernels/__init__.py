"""The CPU kernels of int8 and q4: C++ sources that are compiled once per machine, when they are first needed."""

from __future__ import annotations

import torch

from spec_envs.decoding.model.kernels.building import library
from spec_envs.decoding.model.kernels.parallel import threads

__all__ = ["fast", "library", "threads"]


def fast() -> bool:
    """Return whether the kernels are available and use the processor's int8 instructions (AMX, AVX-512 VNNI,
    AVX-VNNI or AVX2)."""
    found = library() if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else None
    return found is not None and bool(found.accelerated() > 0)
