"""Compile the kernels once for a processor, keep them in the user's cache folder, and load them.

A kept library is loaded only if no other user can have written it and it is whole: its name contains the SHA-256 of its
contents. One process compiles and the others wait; where the folder cannot be used, each process compiles for itself in
a temporary folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch  # noqa: F401 - its OpenMP runtime is loaded first and serves these kernels too: one pool of threads
from filelock import FileLock
from platformdirs import user_cache_path

from spec_envs.waiting import turn

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")

Command = tuple[str, ...]
log = logging.getLogger(__name__)


class BuildError(Exception):
    """The kernels could not be built; the message is one sentence on why."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; where they are not available, log a warning with the reason and return None."""
    try:
        return first_built()
    except BuildError as error:
        log.warning("int8 and q4 are not available here: %s", error)
        return None


def first_built() -> ctypes.CDLL:
    """Return the kernels as the first compiler that succeeds builds them.

    Raises:
        BuildError: no compiler succeeds, or the system does not let the kernels run.
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
            log.warning("%s; %s was used", failure, shlex.join(compiler))
        if not kernels.usable():
            raise BuildError("the system does not grant the tile registers")
        return kernels
    raise BuildError("; ".join(failures) or f"no C++ compiler ({', '.join(COMPILERS)}) was found")


def compilers() -> Iterator[Command]:
    """Yield ``$CXX`` and the first compiler on PATH, as commands."""
    try:
        named = tuple(shlex.split(os.environ.get("CXX", "")))
    except ValueError:
        named = (os.environ["CXX"],)
    if named:
        yield named
    if (found := next(filter(shutil.which, COMPILERS), None)) and (found,) != named:
        yield (found,)


def built(compiler: Command, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """Return the kernels for this processor, from the cache or compiled now.

    Raises:
        BuildError: the compiler cannot build them, or they cannot be loaded.
    """
    key = fingerprint(compiler, flags)
    try:
        folder = private_folder()
        return load_whole(folder, key) or compile_once(folder, key, compiler, flags)
    except (OSError, NotImplementedError) as error:  # no write access, no locks, or libraries there may not be run
        log.warning("the kernels are compiled for this process only: %s", error)
    try:
        with tempfile.TemporaryDirectory() as scratch:  # once it is loaded, a library no longer needs its file
            return ctypes.CDLL(str(compile_into(Path(scratch), key, compiler, flags)))
    except OSError as error:
        raise BuildError(f"the kernels can neither be kept nor loaded: {one_line(str(error))}") from None


def fingerprint(compiler: Command, flags: tuple[str, ...]) -> str:
    """Return a hash of what a build depends on: sources, flags, compiler, and the processor's features as it sees
    them."""
    macros = run(compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull)
    sources = [path.read_text() for path in sorted(SOURCES.rglob("*")) if path.suffix in (".h", ".cpp")]
    return hashlib.sha256("\0".join([*compiler, *flags, macros, *sources]).encode()).hexdigest()[:16]


def private_folder() -> Path:
    """Return the folder of compiled kernels, created if it does not exist.

    Raises:
        OSError: it cannot be created, or other users may write to it.
    """
    try:
        folder = user_cache_path("spec-envs") / "kernels"
    except RuntimeError as error:  # the user has no home folder
        raise OSError(str(error)) from None
    if not folder.is_absolute():
        raise OSError(f"the cache folder {folder} is not an absolute path")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if not ours(folder):
        raise OSError(f"{folder} belongs to another user or may be written to by others; delete it, or run chmod go-w")
    return folder


def ours(path: Path) -> bool:
    """Return whether a file or folder belongs to this user and no other user may write to it."""
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def load_whole(folder: Path, key: str) -> ctypes.CDLL | None:
    """Return the library of that key, or None if there is none that is ours, whole, and can be loaded."""
    for path in folder.glob(f"{key}-*.so"):
        with contextlib.suppress(OSError):  # built by another system over the same home folder, or deleted just now
            if ours(path) and path.name == name(key, path.read_bytes()):
                return ctypes.CDLL(str(path))
    return None


def compile_once(folder: Path, key: str, compiler: Command, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Return the library, which one process compiles while the others wait for it.

    Damaged libraries of that key and what a killed compilation left are deleted.
    """
    lock = FileLock(folder / "lock", mode=0o600)
    with turn(lock, log, "waiting for another process, which compiles the kernels"):
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
    """Compile the library in ``folder`` and return its path."""
    log.warning("compiling the kernels of int8 and q4; this takes about a minute and happens once")
    made = folder / "kernels.so"
    run(compiler, *flags, str(SOURCES / "kernels.cpp"), "-o", str(made))
    made.chmod(0o700)
    return made.rename(folder / name(key, made.read_bytes()))


def name(key: str, contents: bytes) -> str:
    """Return the file name of a library."""
    return f"{key}-{hashlib.sha256(contents).hexdigest()}.so"


def run(compiler: Command, *arguments: str) -> str:
    """Run a compiler and return its output.

    Raises:
        BuildError: the compiler cannot be run, or it failed.
    """
    shown, environment = shlex.join(compiler), {**os.environ, "LC_ALL": "C"}  # so that errors contain "error:"
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
    """Return the first line with an error, or else the first line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else "")
