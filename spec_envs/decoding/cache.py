"""Keys and values of a text, and which of them new rows see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spec_envs.decoding.shape import Shape

BLOCK = 64  # rows are allocated in blocks, which the int8 kernels read as a whole


class KVCache:
    """Keys and values of every layer, ``[2, layers, batch, kv_heads, rows, head_dim]``.

    ``length`` rows are committed. A forward writes behind them; committing rows or rolling back is setting
    ``length``, keeping a path of a tree is one gather.

    Args:
        capacity: most rows of a sequence.
    """

    def __init__(self, shape: Shape, capacity: int, dtype: torch.dtype, device: torch.device, batch: int = 1):
        rows = -(-capacity // BLOCK) * BLOCK
        self.data = torch.zeros(
            2, shape.layers, batch, shape.kv_heads, rows, shape.head_dim, dtype=dtype, device=device
        )
        self.capacity = capacity
        self.length = 0
        self.masks: MaskBuffer | None = None
        self.graphs: dict[tuple, Any] = {}  # forwards captured over this memory

    def keep(self, rows: Sequence[int]) -> None:
        """Commit the rows ``length + r`` for r in ``rows`` (ascending) as the next rows of the sequence."""
        start, count = self.length, len(rows)
        if list(rows) != list(range(count)):
            index = torch.tensor(rows, device=self.data.device) + start
            self.data[..., start : start + count, :] = self.data.index_select(4, index)
        self.length += count

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences of the batch."""
        self.data = self.data[:, :, sequences].contiguous()

    def mask(self, n: int, seen: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Additive mask ``[batch or 1, 1, n, length + n]`` of ``n`` new rows, in the cache's dtype.

        Args:
            seen: ``[n, m]`` (bool), which of the last m columns a row sees, all before them being visible; by default
                each sees the new rows up to itself.
            padding: ``[batch]`` columns on the left that nobody sees.

        Returns:
            None where no mask is needed: one row, or causal rows of an empty cache.
        """
        if padding is not None:
            return padding_mask(padding, n, self.length + n, self.data.dtype)
        if seen is None:
            if n == 1 or self.length == 0:
                return None
            seen = torch.ones(n, n, dtype=torch.bool, device=self.data.device).tril_()
        if self.masks is None or not self.masks.fits(*seen.shape):
            rows, columns = seen.shape
            self.masks = MaskBuffer(rows, columns, self.capacity, self.data.dtype, self.data.device)
        return self.masks.window(self.length + n - seen.shape[1], seen)


class MaskBuffer:
    """Additive masks for tree rows behind a prefix of any length.

    One buffer of zeros with the tree's block at its right end; the mask for a prefix of any length is a window
    on it, so nothing but the block itself is ever written.
    """

    def __init__(self, rows: int, columns: int, capacity: int, dtype: torch.dtype, device: torch.device):
        rows, columns = max(rows, 64), max(columns, 128)
        self.capacity = capacity
        self.buffer = torch.zeros(1, 1, rows, capacity + columns, dtype=dtype, device=device)

    def fits(self, rows: int, columns: int) -> bool:
        """Whether a block of this size has room."""
        return rows <= self.buffer.shape[2] and columns <= self.buffer.shape[3] - self.capacity

    def window(self, prefix: int, seen: Tensor) -> Tensor:
        """Mask ``[1, 1, n, prefix + m]`` for ``seen`` ``[n, m]`` (bool) behind ``prefix`` visible rows."""
        n, m = seen.shape
        block = self.buffer[0, 0, :n, self.capacity : self.capacity + m]
        block.fill_(float("-inf")).masked_fill_(seen, 0.0)
        window = self.buffer[:, :, :n, self.capacity - prefix : self.capacity + m]
        return window if window.device.type == "cpu" else window.clone()  # CUDA kernels want aligned rows


def padding_mask(padding: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[batch, 1, rows, columns]``: causal, and blind to padding on the left.

    The lowest finite number stands for minus infinity, so that a padding row, which sees nothing, stays a number.
    """
    column = torch.arange(columns, device=padding.device)
    row = torch.arange(columns - rows, columns, device=padding.device)
    hidden = (column[None, None, :] < padding[:, None, None]) | (column[None, None, :] > row[None, :, None])
    mask = torch.zeros(hidden.shape, dtype=dtype, device=padding.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
