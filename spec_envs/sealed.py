"""Files with a checksum: each holds the SHA-256 of its contents, so that damage is noticed when it is read.

These are JSON, PyTorch and safetensors files. Files of other programs, which have no checksum, are read too.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from spec_envs.files import read_json, write_bytes, write_json

SEAL = "sha256"


def digest(content: Any) -> str:
    """Return the SHA-256 of nested dictionaries and lists of tensors, numbers and texts."""
    hashed = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            hashed.update(f"{value.dtype}{tuple(value.shape)}".encode())
            hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            hashed.update(f"{{{len(value)}".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, list | tuple):
            hashed.update(f"[{len(value)}".encode())
            for item in value:
                feed(item)
        else:
            hashed.update(f"{value!r},".encode())

    feed(content)
    return hashed.hexdigest()


def unsealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return an object without its hash.

    Raises:
        ValueError: the contents do not match the hash.
    """
    seal = content.get(SEAL)
    rest = {key: value for key, value in content.items() if key != SEAL}
    if seal is not None and seal != digest(rest):
        raise ValueError("its contents are not those that were written")
    return rest


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object and its hash, whole or not at all."""
    plain = json.loads(json.dumps(content))  # the keys become texts, as they are read again
    write_json(path, plain | {SEAL: digest(plain)})


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """Return the JSON object that ``write_sealed`` wrote.

    Raises:
        ValueError: the file is missing or damaged; the sentence names it and ends with ``remedy``.
    """
    content = read_json(path, remedy)
    try:
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return unsealed(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from None


def write_torch(path: Path, state: dict[str, Any]) -> None:
    """Write a file as ``torch.save`` does, whole or not at all.

    The file is a zip archive whose comment holds the hash of all bytes before it, so that other programs read it as any
    file of PyTorch. It is made in memory first, because torch does not report why it could not write.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    archive = buffer.getvalue()[:-2]  # the last two bytes are the length of the comment, 0
    comment = hashlib.sha256(archive).hexdigest().encode()
    write_bytes(path, archive + len(comment).to_bytes(2, "little") + comment)


def read_torch(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Return the state that ``write_torch`` wrote, on the CPU; only tensors and plain values are unpickled.

    Args:
        what: name of the file for errors, such as "the checkpoint".
        remedy: what to do about a damaged file, such as "delete it to start over".

    Raises:
        ValueError: the file is missing or damaged, or would take more memory than its own size; the sentence names it.
    """
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            comment = archive.comment
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
        if comment and hashlib.sha256(data[: -len(comment) - 2]).hexdigest().encode() != comment:
            raise ValueError("its contents are not those that were written")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it holds no dictionary")
        if size_of(state) > len(data):
            raise ValueError("its tensors are larger than the file")
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror or first_line(error)}; {remedy}") from None
    except Exception as error:  # zipfile, torch and its unpickler each raise their own for a damaged file
        raise ValueError(f"cannot read {what} {path}: it is damaged ({first_line(error)}); {remedy}") from None
    return state


def size_of(content: Any) -> int:
    """Return the bytes of all tensors in nested dictionaries and lists."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, dict):
        return sum(map(size_of, content.values()))
    return sum(map(size_of, content)) if isinstance(content, list | tuple) else 0


def write_weights(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write a safetensors file with a hash of its tensors and metadata, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    data = save(tensors, metadata | {SEAL: digest([tensors, sorted(metadata.items())])})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # the library writes it in random order
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_bytes(path, len(text).to_bytes(8, "little") + text + data[end:])


def read_weights(path: Path, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Args:
        what: name of the file for errors, such as "the policy".
        remedy: what to do about a damaged file.

    Raises:
        ValueError: the file is missing or damaged; the sentence names it.
    """
    try:
        path.open("rb").close()  # safetensors does not report why it cannot open a file
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            metadata = dict(file.metadata() or {})
        seal = metadata.pop(SEAL, None)
        if seal is not None and seal != digest([tensors, sorted(metadata.items())]):
            raise ValueError("its contents are not those that were written")
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror or first_line(error)}; {remedy}") from None
    except Exception as error:  # safetensors raises several kinds for a damaged header
        raise ValueError(f"cannot read {what} {path}: it is damaged ({first_line(error)}); {remedy}") from None
    return tensors, metadata


def number_of(content: dict[str, Any], name: str, path: Path, remedy: str, least: float = 0.0) -> float:
    """Return a number that a file must hold.

    Raises:
        ValueError: it is missing, not finite, or below ``least``; the sentence names the file.
    """
    try:
        value = float(content[name])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not least <= value < math.inf:
        raise ValueError(f"{path} is damaged ({name} is {content.get(name)!r}, expected a number); {remedy}")
    return value


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class where the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
