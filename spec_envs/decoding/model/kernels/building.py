"""The compiled kernels: built once for a processor, kept in the user's cache folder, and loaded from it if nobody else
can have written there and they are whole.

The name of a library holds the SHA-256 of its contents. One process builds and the others wait; where the folder cannot
be used, a process builds for itself in a temporary folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch  # noqa: F401 - its OpenMP runtime, loaded first, serves these kernels too: one pool of threads
from filelock import FileLock
from platformdirs import user_cache_path

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")

Command = tuple[str, ...]


class BuildError(Exception):
    """One sentence on why the kernels could not be built."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, after one line that says why, where they cannot be had."""
    try:
        return first_built()
    except BuildError as error:
        tell(f"int8 decoding is not available here: {error}")
        return None


def first_built() -> ctypes.CDLL:
    """The kernels by the first compiler that builds them.

    Raises:
        BuildError: there is none, or the system does not let them run.
    """
    if sys.platform == "win32":
        raise BuildError("the kernels are built on Linux and macOS only")
    failures = []
    for compiler in compilers():
        try:
            kernels = built(compiler)
        except BuildError as error:
            failures.append(str(error))
            continue
        for failure in failures:
            tell(f"{failure}; {shlex.join(compiler)} was used")
        if not kernels.usable():
            raise BuildError("the system does not grant the tile registers")
        return kernels
    raise BuildError("; ".join(failures) or f"no C++ compiler ({', '.join(COMPILERS)}) was found")


def compilers() -> Iterator[Command]:
    """``$CXX`` and the first compiler on PATH, as commands."""
    try:
        named = tuple(shlex.split(os.environ.get("CXX", "")))
    except ValueError:
        named = (os.environ["CXX"],)
    if named:
        yield named
    if (found := next(filter(shutil.which, COMPILERS), None)) and (found,) != named:
        yield (found,)


def built(compiler: Command, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The kernels for this processor, from the cache or compiled now.

    Raises:
        BuildError: the compiler cannot build them, or they cannot be loaded.
    """
    key = fingerprint(compiler, flags)
    try:
        folder = private_folder()
        return load_whole(folder, key) or alone(folder, key, compiler, flags)
    except (OSError, NotImplementedError) as error:  # a folder without write access, locks, or libraries that run
        tell(f"the int8 kernels are compiled for this process alone: {error}")
    try:
        with tempfile.TemporaryDirectory() as scratch:  # a library that is loaded needs its file no more
            return ctypes.CDLL(str(compile_into(Path(scratch), key, compiler, flags)))
    except OSError as error:
        raise BuildError(f"the kernels can neither be kept nor loaded: {one_line(str(error))}") from None


def fingerprint(compiler: Command, flags: tuple[str, ...]) -> str:
    """What tells builds apart: sources, flags, compiler, and the processor's features as the compiler sees them."""
    macros = run(compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull)
    sources = [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    return hashlib.sha256("\0".join([*compiler, *flags, macros, *sources]).encode()).hexdigest()[:16]


def private_folder() -> Path:
    """The folder of compiled kernels, made if it is not there.

    Raises:
        OSError: it cannot be had, or others may write to it.
    """
    try:
        folder = user_cache_path("spec-envs") / "kernels"
    except RuntimeError as error:  # no home
        raise OSError(str(error)) from None
    if not folder.is_absolute():
        raise OSError(f"the cache folder {folder} is not an absolute path")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not ours(folder):
        raise OSError(f"{folder} belongs to another user or may be written to by others; delete it, or run chmod go-w")
    return folder


def ours(path: Path) -> bool:
    """Whether a file or folder is this user's, and nobody else may write to it."""
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def load_whole(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library of that key, if there is one which is ours, whole, and can be loaded."""
    for path in folder.glob(f"{key}-*.so"):
        with contextlib.suppress(OSError):  # built by another system over the same home, or taken away just now
            if ours(path) and path.name == name(key, path.read_bytes()):
                return ctypes.CDLL(str(path))
    return None


def alone(folder: Path, key: str, compiler: Command, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Build the library while other processes wait; what is there of that key, and what a killed build left, goes."""
    with FileLock(folder / "lock", mode=0o600):
        if found := load_whole(folder, key):  # another process was faster
            return found
        for path in folder.glob(f"{key}-*.so"):
            path.unlink()
        scratch = folder / "building"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        try:
            made = compile_into(scratch, key, compiler, flags)
            return ctypes.CDLL(str(made.replace(folder / made.name)))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def compile_into(folder: Path, key: str, compiler: Command, flags: tuple[str, ...]) -> Path:
    """A newly compiled library in ``folder``."""
    tell("compiling the int8 kernels (once)")
    made = folder / "kernels.so"
    run(compiler, *flags, str(SOURCES / "kernels.cpp"), "-o", str(made))
    made.chmod(0o700)
    return made.rename(folder / name(key, made.read_bytes()))


def name(key: str, contents: bytes) -> str:
    """The file name of a library."""
    return f"{key}-{hashlib.sha256(contents).hexdigest()}.so"


def run(compiler: Command, *arguments: str) -> str:
    """Output of a compiler.

    Raises:
        BuildError: it is not there, or it failed.
    """
    shown, environment = shlex.join(compiler), {**os.environ, "LC_ALL": "C"}  # with errors that are called error
    try:
        done = subprocess.run(
            [*compiler, *arguments], capture_output=True, text=True, errors="replace", env=environment
        )
    except OSError as error:
        raise BuildError(f"the compiler {shown} cannot be run ({error.strerror})") from None
    if done.returncode:
        reason = one_line(done.stderr) or f"it ended with status {done.returncode}"
        raise BuildError(f"{shown} could not build the kernels: {reason}")
    return done.stdout


def one_line(output: str) -> str:
    """The first line that tells of an error, or the first one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else "")


def tell(sentence: str) -> None:
    """One line for the user."""
    print(sentence, file=sys.stderr, flush=True)
