"""Weights as the blocks of a GGUF file: a view of the mapped file that is dequantised where numbers are needed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

GROUP = 8192  # blocks that are dequantised together; what they take, a few megabytes, lives for a moment


class Blocks:
    """A weight ``[out, in]`` as stored: each row is a sequence of blocks of as many inputs.

    Args:
        kind: of the blocks.
        data: their bytes, uint8 ``[out, bytes per row]``.

    Attributes:
        kind, data: as given.
        shape: ``[out, in]``.
    """

    def __init__(self, kind: GGMLQuantizationType, data: Tensor):
        per_block, size = GGML_QUANT_SIZES[kind]
        self.kind, self.data = kind, data
        self.shape = torch.Size((data.shape[0], data.shape[1] // size * per_block))

    def dense(self) -> Tensor:
        """Return the weight ``[out, in]`` in float32."""
        return dequantised(self.data.numpy(), self.kind).view(self.shape)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids`` ``[...]`` in float32, ``[..., in]``."""
        found = dequantised(self.data[ids.reshape(-1)].numpy(), self.kind)
        return found.view(*ids.shape, self.shape[1])

    def take(self, order: Tensor) -> Blocks:
        """Return a copy of the rows of ``order`` ``[n]``, in that order."""
        return Blocks(self.kind, self.data[order])

    @staticmethod
    def joined(parts: Sequence[Blocks]) -> list[Blocks]:
        """Return weights of the same inputs, one below the other; those of one kind that follow each other are
        joined."""
        groups = (list(group) for _, group in itertools.groupby(parts, lambda part: part.kind))
        return [
            group[0] if len(group) == 1 else Blocks(group[0].kind, torch.cat([part.data for part in group]))
            for group in groups
        ]


def dense(weight: Tensor | Blocks) -> Tensor:
    """Return a weight as a tensor: blocks in float32, a tensor as it is."""
    return weight.dense() if isinstance(weight, Blocks) else weight


def dequantised(data: np.ndarray, kind: GGMLQuantizationType) -> Tensor:
    """Return the numbers of whole blocks, in float32 and in one dimension.

    Args:
        data: their bytes; only the order counts, not the shape.
        kind: of the blocks.

    Raises:
        NotImplementedError: the library cannot read this kind of blocks.
    """
    per_block, size = GGML_QUANT_SIZES[kind]
    flat = data.reshape(-1)
    out = np.empty(flat.size // size * per_block, np.float32)
    for begin in range(0, flat.size, GROUP * size):
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # scales of a damaged file, which users of the numbers refuse
            some = quants.dequantize(flat[begin : begin + GROUP * size].reshape(1, -1), kind).reshape(-1)
        out[begin // size * per_block :][: len(some)] = some
    return torch.from_numpy(out)
