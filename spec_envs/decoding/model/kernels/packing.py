"""Quantised weights in the order in which the kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK, COLUMNS, TILE = 64, 32, 16  # inputs and outputs that are packed together, outputs of a tile
NOT_FINITE = "the weights hold numbers that are not finite; fetch or convert them again"
GROUP = 4096  # outputs that are packed together: what they take in float32 lives for a moment


def hadamard(order: int) -> Tensor:
    """Return the symmetric orthogonal Hadamard matrix ``[order, order]`` of a power of two, by Sylvester's
    construction."""
    h = torch.ones(1, 1)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    orthogonal: Tensor = h / order**0.5
    return orthogonal


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight ``[out, in]`` per output, after multiplying each block of 64 inputs by the Hadamard matrix
    (QuaRot, arXiv 2404.00456).

    Returns:
        The int8 weight in the order in which the kernels read it, and its scales ``[out rounded up to 32]``.

    Raises:
        ValueError: the weight holds a number that is not finite.
    """
    groups = [packed_group(group) for group in weight.split(GROUP)]
    return torch.cat([tiles for tiles, _ in groups]), torch.cat([scale for _, scale in groups])


def packed_group(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise some outputs of a weight; see ``packed``."""
    w = padded(weight.float(), COLUMNS, BLOCK)
    w = (w.view(len(w), -1, BLOCK) @ hadamard(BLOCK)).flatten(1)
    scale = w.abs().amax(1) / 127
    if not torch.isfinite(scale).all():
        raise ValueError(NOT_FINITE)
    w = (w / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round_().to(torch.int8)
    tiles = w.view(len(w) // COLUMNS, 2, TILE, -1, TILE, 4)  # columns, tile, output, step, four inputs, input
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous(), scale


def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Pad x with zeros below and to the right, up to multiples of ``rows`` and ``columns``."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
