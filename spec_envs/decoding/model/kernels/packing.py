"""Weights in the order in which the kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, COLUMNS, TILE = 64, 32, 16  # inputs and outputs that are packed together, outputs of a tile


def hadamard(order: int) -> Tensor:
    """The symmetric orthogonal Hadamard matrix of a power of two (Sylvester's)."""
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / order**0.5


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight ``[out, in]``, turned by the Hadamard matrix in blocks of 64 inputs (QuaRot, arXiv 2404.00456) and
    quantised per output, in the order in which the kernels read it; and its scales ``[out rounded up to 32]``.

    Raises:
        ValueError: a weight that is not a finite number.
    """
    w = padded(weight.float(), COLUMNS, BLOCK)
    w = (w.unflatten(1, (-1, BLOCK)) @ hadamard(BLOCK)).flatten(1)
    scale = w.abs().amax(1) / 127
    if not torch.isfinite(scale).all():
        raise ValueError(
            "the weights hold numbers that are not finite, which int8 does not; fetch or convert them again"
        )
    w = (w / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_().to(torch.int8)
    tiles = w.view(len(w) // COLUMNS, 2, TILE, -1, TILE, 4)  # columns, tile, output, step, four inputs, input
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous(), scale


def unpacked(tiles: Tensor, scale: Tensor) -> Tensor:
    """The inverse of ``packed``, but for rounding."""
    w = tiles.permute(0, 2, 4, 1, 3, 5).reshape(len(scale), -1, BLOCK).float() * scale[:, None, None]
    return (w @ hadamard(BLOCK)).flatten(1)


def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """``x`` with zeros below and to the right, up to multiples of ``rows`` and ``columns``."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """Outputs of gate and up in turn, a tile of each."""
    return torch.stack([gate.unflatten(0, (-1, TILE)), up.unflatten(0, (-1, TILE))], 1).flatten(0, 2)
