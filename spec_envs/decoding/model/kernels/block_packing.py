"""The blocks of a GGUF file in the order in which the kernels read them; the numbers stay as they are.

The structures are those of ggml's quantised types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names them,
and ``gguf.quants`` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from spec_envs.decoding.model.kernels.packing import COLUMNS
from spec_envs.decoding.weights.blocks import Blocks, dequantised

Kind = GGMLQuantizationType
GROUP = 4096  # rows that are packed together: their numbers, a byte each, live for a moment


class Stored(NamedTuple):
    """The parts of some rows of blocks: n rows of s blocks of i inputs.

    Attributes:
        head: scales in float16, and the minima after them if there are any, ``[parts, n, s]``.
        lead: scales of the parts of a block in signed bytes, and their minima, ``[parts, n, s, of a block]``.
        numbers: the numbers that they multiply, ``[n, s * i]``: 0 to 15 with minima, signed bytes without.
    """

    head: np.ndarray
    lead: np.ndarray
    numbers: np.ndarray


def q4_0(data: np.ndarray) -> Stored:
    """Read blocks of Q4_0: a scale, and numbers from -8 on, which become a minimum."""
    scale = half(data, 0)
    return Stored(np.stack([scale, -8 * scale]), nothing(data), integers(data, Kind.Q4_0, {0: 1}) + 8)


def q4_1(data: np.ndarray) -> Stored:
    """Read blocks of Q4_1: scale and minimum."""
    return Stored(np.stack([half(data, 0), half(data, 2)]), nothing(data), integers(data, Kind.Q4_1, {0: 1, 2: 0}))


def q5_0(data: np.ndarray) -> Stored:
    """Read blocks of Q5_0: a scale."""
    return Stored(half(data, 0)[None], nothing(data), integers(data, Kind.Q5_0, {0: 1}))


def q8_0(data: np.ndarray) -> Stored:
    """Read blocks of Q8_0: a scale."""
    return Stored(half(data, 0)[None], nothing(data), integers(data, Kind.Q8_0, {0: 1}))


def q4_k(data: np.ndarray) -> Stored:
    """Read blocks of Q4_K: eight parts with scales and minima of 6 bits, which two numbers in float16 multiply."""
    n, s = data.shape[:2]
    parts = [part.reshape(n, s, 8) for part in quants.Q4_K.get_scale_min(data[..., 4:16].reshape(n * s, 12))]
    plain = data.copy()
    plain[..., 4:8], plain[..., 8:12], plain[..., 12:16] = 1, 0, 1  # the packed form of scales of 1 and minima of 0
    numbers = integers(plain, Kind.Q4_K, {0: 1, 2: 0})
    return Stored(np.stack([half(data, 0), -half(data, 2)]), np.stack(parts), numbers)


def q6_k(data: np.ndarray) -> Stored:
    """Read blocks of Q6_K: sixteen parts with scales of 8 bits, which a number in float16 multiplies."""
    plain = data.copy()
    plain[..., 192:208] = 1
    return Stored(half(data, 208)[None], data[None, ..., 192:208], integers(plain, Kind.Q6_K, {208: 1}))


class Format(NamedTuple):
    """A format of blocks.h: its number in ``Kind``, how a stored kind becomes it, and the bits of its numbers."""

    number: int
    read: Callable[[np.ndarray], Stored]
    bits: int


FORMATS = {
    Kind.Q4_0: Format(1, q4_0, 4),
    Kind.Q4_1: Format(1, q4_1, 4),
    Kind.Q4_K: Format(2, q4_k, 4),
    Kind.Q5_0: Format(3, q5_0, 8),
    Kind.Q8_0: Format(3, q8_0, 8),
    Kind.Q6_K: Format(4, q6_k, 8),
}


def packed_blocks(weight: Blocks) -> tuple[int, Tensor]:
    """Return the number of the kernels' format for a weight, and its bytes ``[out rounded up to 32 / 32, …]``.

    Raises:
        ValueError: scales are not finite, or too large for the format.
    """
    made = FORMATS[weight.kind]
    columns = [columns_of(made, group, weight.kind) for group in weight.data.split(GROUP)]
    return made.number, torch.from_numpy(np.concatenate(columns))


def columns_of(made: Format, rows: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Return the bytes ``[n rounded up to 32 / 32, …]`` of rows ``[n, bytes]`` of blocks."""
    size = GGML_QUANT_SIZES[kind][1]
    data = np.pad(rows.numpy(), ((0, -len(rows) % COLUMNS), (0, 0))).reshape(-1, rows.shape[1] // size, size)
    with np.errstate(over="ignore", invalid="ignore"):
        head, lead, numbers = made.read(data)
    if not np.isfinite(head).all():
        raise ValueError(
            "the weights' blocks hold scales that are not finite or too large for q4; fetch the GGUF file again, or "
            "pass dtype float32"
        )
    n, s = data.shape[:2]
    columns = n // COLUMNS
    parts = lead.shape[-1] or 1
    # [columns, s, parts of a block, half, group of inputs, output, inputs of a group]
    wide = 32 // made.bits
    split = numbers.reshape(columns, 2, COLUMNS // 2, s, parts, -1, wide).transpose(0, 3, 4, 1, 5, 2, 6)
    body = nibbles(split) if made.bits == 4 else split[..., [0, 2, 1, 3]]
    body = body.reshape(columns, s, parts, -1).view(np.uint8)
    leads = lead.reshape(len(lead), columns, COLUMNS, s, parts if lead.size else 0).transpose(1, 3, 4, 0, 2)
    if lead.size:
        body = np.concatenate([leads.reshape(columns, s, parts, -1).view(np.uint8), body], -1)
    heads = np.ascontiguousarray(head.reshape(-1, columns, COLUMNS, s).transpose(1, 3, 0, 2)).view(np.uint8)
    return np.concatenate([heads.reshape(columns, s, -1), body.reshape(columns, s, -1)], -1)


def nibbles(numbers: np.ndarray) -> np.ndarray:
    """Return eight numbers ``[..., 8]`` in four bytes ``[..., 4]``: those that a product takes together are 16 bits
    apart."""
    low, high = numbers[..., [0, 4, 1, 5]], numbers[..., [2, 6, 3, 7]]
    packed: np.ndarray = (low | high << 4).astype(np.uint8)
    return packed


def half(data: np.ndarray, at: int) -> np.ndarray:
    """Return the float16 at byte ``at`` of blocks ``[n, s, bytes]``."""
    return np.ascontiguousarray(data[..., at : at + 2]).view(np.float16)[..., 0]


def nothing(data: np.ndarray) -> np.ndarray:
    """Return the lead of blocks ``[n, s, bytes]`` that have none."""
    return np.zeros((0, *data.shape[:2], 0), np.int8)


def integers(data: np.ndarray, kind: GGMLQuantizationType, constants: dict[int, float]) -> np.ndarray:
    """Return the numbers ``[n, s * inputs]`` (int8) of blocks ``[n, s, bytes]``, read with other scales.

    Args:
        data: the blocks.
        kind: of the blocks.
        constants: the float16 to read at some bytes of a block instead of what is there.
    """
    data = data.copy()
    for at, value in constants.items():
        data[..., at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    found: np.ndarray = dequantised(data, kind).numpy().astype(np.int8).reshape(len(data), -1)
    return found
