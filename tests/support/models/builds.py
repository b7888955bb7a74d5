"""Flags of kernel builds for other processors than this one, and a check that kernels can be built here."""

from __future__ import annotations

import hashlib
import platform
import sys
from pathlib import Path

from spec_envs.decoding.model import kernels
from spec_envs.decoding.model.kernels import building

# Where a compiler is present a failed build must fail the tests, not skip them.
WITHOUT_KERNELS = kernels.library() is None and (sys.platform != "linux" or next(building.compilers(), None) is None)
X86 = platform.machine() == "x86_64"
WITHOUT_TILES = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16") if X86 else ()
TILES = Path(__file__).with_name("tiles.h")  # tile instructions emulated; a build depends on the hash of the file, too
EMULATED_TILES = ("-include", str(TILES), f"-DHASH_OF_TILES={hashlib.sha256(TILES.read_bytes()).hexdigest()[:16]}")
BUILDS = {  # compiler flags, and the possible kinds of matrix product: tiles (2), vectors (1), scalar code (0)
    "vectors": ((*building.FLAGS, *WITHOUT_TILES), (0, 1)),
    "short vectors": ((*building.FLAGS, *WITHOUT_TILES, *(("-mno-avx512f",) if X86 else ())), (0, 1)),
    "without VNNI": ((*building.FLAGS, *WITHOUT_TILES, *(("-mno-avx512f", "-mno-avxvnni") if X86 else ())), (0, 1)),
    "portable": ((*building.FLAGS, *WITHOUT_TILES, *(("-mno-avx2",) if X86 else ())), (0,)),
}
if X86:
    BUILDS["tiles"] = ((*building.FLAGS, *WITHOUT_TILES, *EMULATED_TILES), (2,))
COMPILER = next(building.compilers(), ("c++",))
