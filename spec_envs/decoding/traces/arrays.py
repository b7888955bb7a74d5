"""Archives of arrays from sources that are not trusted."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np


def read_npz(path: Path, most: int) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name.

    Args:
        most: bytes that the arrays may take together.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, too large, or holds objects that would have to be unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (size := sum(member.file_size for member in archive.infolist())) > most:
                raise ValueError(f"its arrays take {size} bytes; expected at most {most}")
            for member in archive.infolist():
                with archive.open(member) as file:
                    _check_header(file, member)
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, SyntaxError) as error:
        raise ValueError(f"it is no archive of arrays: {error}") from None


def _check_header(file: IO[bytes], member: zipfile.ZipInfo) -> None:
    """Refuse an array whose header claims more bytes than the file has, before memory is allocated for it."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if math.prod(shape) * dtype.itemsize > member.file_size or min(shape, default=0) < 0:
        raise ValueError(f"{member.filename} claims the shape {shape}, which is more than it holds")
