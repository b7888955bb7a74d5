"""Read GGUF files, whole or split, which may be cut off anywhere or claim anything.

Every count, length and offset is compared with the size of the file before anything is allocated or looped over.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # letters of the struct module
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")  # of a string
VERSIONS = (2, 3)
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")  # name of a part of a split file


class StoredTensor(NamedTuple):
    """A tensor as it is stored.

    Attributes:
        name: in the file.
        shape: in torch's order.
        kind: of its blocks.
        data: the bytes of the blocks, ``[..., bytes of a row]``.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray


@dataclass(frozen=True)
class GGUF:
    """The contents of a file, or of all parts of a split one.

    Attributes:
        path: of the file, or of the first part, which has the metadata.
        metadata: values by key; arrays are lists.
        tensors: by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


class Header:
    """Reads values one after another from the start of a file, never beyond its end."""

    def __init__(self, data: np.ndarray):
        self.data, self.bytes, self.at = data, data.data, 0

    def take(self, size: int) -> memoryview:
        """Return the next ``size`` bytes; raise ValueError if there are fewer."""
        if size > len(self.data) - self.at:
            raise ValueError(f"it is cut off, or damaged at byte {self.at}")
        self.at += size
        return self.data[self.at - size : self.at].data

    def values(self, letter: str, count: int = 1) -> list[Any]:
        """Return ``count`` numbers of one kind."""
        code = struct.Struct(f"<{letter}")
        return [value for (value,) in code.iter_unpack(self.take(code.size * count))]

    def text(self) -> str:
        """Return a string."""
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        """Return ``count`` strings; there are hundreds of thousands in a file."""
        data, at, found = self.bytes, self.at, []
        for _ in range(count):
            begin = at + LENGTH.size
            if begin > len(data) or (at := begin + LENGTH.unpack_from(data, at)[0]) > len(data):
                raise ValueError(f"it is cut off, or damaged at byte {begin}")
            found.append(str(data[begin:at], "utf-8"))
        self.at = at
        return found

    def value(self, kind: int) -> Any:
        """Return a metadata value of type ``kind``."""
        if kind in SCALARS:
            return self.values(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        (inner,), (count,) = self.values("I"), self.values("Q")
        if inner in SCALARS:
            return self.values(SCALARS[inner], count)
        if inner != STRING:
            raise ValueError(f"it has an array of the unknown type {inner}")
        return self.texts(count)


def read_gguf(path: Path) -> GGUF:
    """Read a GGUF file, together with the other parts if it is one part of a split file.

    Raises:
        ValueError: the file is no GGUF file, is damaged or cut off, or its parts are missing or do not belong together.
    """
    files = part_files(path)
    parts = [read_one(file) for file in files]
    counts = dict.fromkeys(str(part.metadata.get("split.count", 1)) for part in parts)
    numbers = [part.metadata.get("split.no", 0) for part in parts]
    if list(counts) != [str(len(parts))] or numbers != list(range(len(parts))):
        raise ValueError(
            f"{path} is split into parts (split.count {', '.join(counts)}) that its name and folder do not have; "
            "expected all of them in one folder, named as they were published: …-00001-of-0000N.gguf"
        )
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{part.path} holds the tensor {min(twice)!r} of another part; fetch the parts again")
        tensors |= part.tensors
    expected = parts[0].metadata.get("split.tensors.count", len(tensors)) if len(parts) > 1 else len(tensors)
    if len(tensors) != expected:
        raise ValueError(f"{path} and its other parts hold {len(tensors)} tensors, expected {expected}; fetch it again")
    return GGUF(files[0], parts[0].metadata, tensors)


def part_files(path: Path) -> list[Path]:
    """Return all parts of the split file to which ``path`` belongs, in order, or ``path`` alone.

    Only the names are compared; nothing is read.

    Raises:
        ValueError: some parts are missing.
    """
    match = PART.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return [path]
    names = (f"{match['stem']}-{i:05}-of-{match['count']}.gguf" for i in range(1, int(match["count"]) + 1))
    files = [path.with_name(name) for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        shown = f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''} {'is' if len(missing) == 1 else 'are'}"
        raise ValueError(
            f"{path} is one of {len(files)} parts of a model, and {shown} not beside it; put all parts into one folder"
        )
    return files


def read_one(path: Path) -> GGUF:
    """Read one file.

    Raises:
        ValueError: it is no GGUF file, is damaged or cut off.
    """
    try:
        data = np.memmap(path, mode="c")  # never written to; torch wants arrays that could be
        header = Header(data)
        return GGUF(path, *contents(header, data))
    except (ValueError, OSError) as error:  # a UnicodeDecodeError is a ValueError, too
        raise ValueError(f"cannot read the GGUF file {path}: {error}; fetch it again") from None


def contents(header: Header, data: np.ndarray) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Return the metadata by key and the tensors by name."""
    if bytes(header.take(4)) != b"GGUF":
        raise ValueError("it does not begin with the letters GGUF")
    (version,) = header.values("I")
    if version not in VERSIONS:
        raise ValueError(
            f"it is of version {version}, expected {' or '.join(map(str, VERSIONS))} in little-endian order"
        )
    tensor_count, key_count = header.values("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key, (kind,) = header.text(), header.values("I")
        if key in metadata:
            raise ValueError(f"it has the key {key!r} twice")
        metadata[key] = header.value(kind)
    entries = [entry(header) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise ValueError(f"its alignment is {alignment!r}")
    begin = -(-header.at // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"it has the tensor {name!r} twice")
        tensors[name] = StoredTensor(name, shape, kind, blocks(name, shape, kind, data[begin:], offset))
    return metadata, tensors


def entry(header: Header) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Return name, shape, kind and offset of the next tensor in the header."""
    name, (dimensions,) = header.text(), header.values("I")
    if not 0 < dimensions <= 4:
        raise ValueError(f"its tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed(header.values("Q", dimensions)))
    (kind,), (offset,) = header.values("I"), header.values("Q")
    try:
        return name, shape, GGMLQuantizationType(kind), offset
    except ValueError:
        raise ValueError(f"its tensor {name!r} is of the unknown type {kind}") from None


def blocks(name: str, shape: Sequence[int], kind: GGMLQuantizationType, data: np.ndarray, offset: int) -> np.ndarray:
    """Return the bytes ``[..., bytes of a row]`` of a tensor that begins ``offset`` bytes after the start of the
    data."""
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if not all(shape) or shape[-1] % per_block:
        raise ValueError(f"its tensor {name!r} has the shape {list(shape)}, which is no number of {kind.name} blocks")
    row_bytes = shape[-1] // per_block * block_bytes
    size = math.prod(shape[:-1]) * row_bytes
    if offset + size > len(data):
        raise ValueError(f"it is cut off: the tensor {name!r} ends {offset + size - len(data)} bytes after its end")
    return data[offset : offset + size].reshape(*shape[:-1], row_bytes)
