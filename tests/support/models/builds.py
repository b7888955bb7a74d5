"""Kernels: whether they are built here, and how they are built for processors with fewer instructions."""

from __future__ import annotations

import platform
import sys

from spec_envs.decoding.model import kernels
from spec_envs.decoding.model.kernels import building

# A build that fails where there is all it needs is a failure of the tests, not a reason to skip them.
WITHOUT_KERNELS = kernels.library() is None and (sys.platform != "linux" or next(building.compilers(), None) is None)
X86 = platform.machine() == "x86_64"
WITHOUT_TILES = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16") if X86 else ()
BUILDS = {  # flags, and what the products are then made of: tiles (2), vectors (1) or neither
    "vectors": ((*building.FLAGS, *WITHOUT_TILES), (0, 1)),
    "short vectors": ((*building.FLAGS, *WITHOUT_TILES, *(("-mno-avx512f",) if X86 else ())), (0, 1)),
    "portable": ((*building.FLAGS, *WITHOUT_TILES, *(("-mno-avx2",) if X86 else ())), (0,)),
}
COMPILER = next(building.compilers(), ("c++",))
