"""The CPU kernels of int8 decoding: C++ sources, compiled once per machine when they are first needed."""

from __future__ import annotations

import torch

from spec_envs.decoding.model.kernels.building import library
from spec_envs.decoding.model.kernels.parallel import threads

__all__ = ["fast", "library", "threads"]


def fast() -> bool:
    """Whether the kernels are here and use the processor's instructions for int8 (Intel AMX, AVX-512 VNNI, AVX2)."""
    found = library() if torch.cpu._is_avx2_supported() else None
    return found is not None and found.accelerated() > 0
