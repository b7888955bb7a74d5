"""The CPU kernels of int8 decoding: C++ sources, compiled once per machine when they are first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch  # its OpenMP runtime, loaded first, serves these kernels too: one pool of threads
from platformdirs import user_cache_path

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, after one line that says why, where they cannot be had."""
    compiler = find_compiler()
    if compiler is None:
        reason = f"no C++ compiler ({', '.join(COMPILERS)}) was found"
    else:
        try:
            kernels = ctypes.CDLL(str(compiled(compiler)))
            if kernels.usable():
                return kernels
            reason = "the system does not grant the tile registers"
        except (OSError, subprocess.CalledProcessError) as error:
            output = (getattr(error, "stderr", None) or str(error)).strip()
            reason = f"{compiler} could not build the kernels: {output.splitlines()[0] if output else error}"
    print(f"int8 decoding is not available here: {reason}", file=sys.stderr, flush=True)
    return None


def find_compiler() -> str | None:
    """``$CXX``, or the first compiler on PATH."""
    return os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)


def compiled(compiler: str, flags: tuple[str, ...] = FLAGS) -> Path:
    """The shared library for this processor, from the cache or compiled now."""
    macros = run(compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull)  # compiler's version, processor's features
    sources = [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    key = hashlib.sha256("\0".join([*flags, macros, *sources]).encode()).hexdigest()[:16]
    target = user_cache_path("spec-envs") / "kernels" / f"{key}.so"
    if target.is_file():
        return target
    print("compiling the int8 kernels (once)", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        run(compiler, *flags, str(SOURCES / "kernels.cpp"), "-o", str(built))
        built.replace(target)
    return target


def run(*command: str) -> str:
    """Output of a command; raises CalledProcessError."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def fast() -> bool:
    """Whether the kernels are here and use the processor's instructions for int8 (Intel AMX, AVX-512 VNNI, AVX2)."""
    found = library() if torch.cpu._is_avx2_supported() else None
    return found is not None and found.accelerated() > 0


def threads() -> int:
    """Threads of a kernel: those of torch."""
    return torch.get_num_threads()
