"""Keys and values of one text or of many, and which of them new rows see."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.model.shape import Shape

BLOCK = 64  # rows are allocated in blocks, which the kernels read as a whole


class CachePlace(NamedTuple):
    """The place where a forward writes its new rows, and the rows they attend to.

    Attributes:
        rows: the rows of every sequence to write, or ``[batch, n]`` with slots.
        columns: how many rows are read, from the first one on, c.
        mask: additive mask ``[batch or 1, 1, n, c]``, or None where the rows are causal.
    """

    rows: slice | Tensor
    columns: int
    mask: Tensor | None


class KVCache:
    """Keys and values of every layer, ``[2, layers, batch, kv_heads, rows, head_dim]``.

    The first ``length`` rows are committed. A forward writes after them; committing rows or rolling back only sets
    ``length``, and keeping a path of a tree is one gather.

    Args:
        shape: of the model.
        capacity: most rows of a sequence.
        dtype, device: of keys and values.
        batch: number of sequences.
    """

    slots: Tensor | None = None  # each sequence is its own row of the batch; compare ``SlotBatch``

    def __init__(self, shape: Shape, capacity: int, dtype: torch.dtype, device: torch.device, batch: int = 1):
        self.data = lazy_zeros(memory(shape, capacity, batch), dtype, device)
        self.capacity = capacity
        self.length = 0
        self.masks: MaskBuffer | None = None
        self.graphs: dict[tuple[object, ...], Any] = {}  # forwards captured over this memory
        self.steps: dict[object, Any] = {}  # what a drafter's steps in the kernels keep for this memory

    def keep(self, rows: Sequence[int]) -> None:
        """Commit the rows ``length + r`` for each r in ``rows`` (ascending) as the next rows of the sequence."""
        start, count = self.length, len(rows)
        if list(rows) != list(range(count)):
            index = torch.tensor(rows, device=self.data.device) + start
            self.data[..., start : start + count, :] = self.data.index_select(4, index)
        self.length += count

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences of the batch."""
        self.data = self.data[:, :, sequences].contiguous()

    def check(self, x: Tensor, seen: Tensor | None, padding: Tensor | None) -> None:
        """Raise ValueError if new rows x ``[batch, n, hidden]`` do not fit."""
        if self.length + x.shape[1] > self.capacity:
            raise ValueError(f"{self.length + x.shape[1]} rows do not fit a cache of {self.capacity}")

    def place(self, n: int, seen: Tensor | None, padding: Tensor | None) -> CachePlace:
        """Return where ``n`` new rows are written and the rows they attend to; the arguments are those of ``mask``."""
        end = self.length + n
        return CachePlace(slice(self.length, end), end, self.mask(n, seen, padding))

    def mask(self, n: int, seen: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Return the additive mask of ``n`` new rows.

        Args:
            n: number of new rows.
            seen: ``[n, m]`` (bool), which of the last m columns each row sees, all columns before them being visible;
                by default each row sees the new rows up to itself.
            padding: number of columns on the left of each sequence that no row sees, ``[batch]``.

        Returns:
            ``[batch or 1, 1, n, length + n]`` in the cache's dtype, or None where no mask is needed: for one row, or
            for causal rows of an empty cache.
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


class Slots:
    """Keys and values ``[2, layers, slots, kv_heads, rows, head_dim]`` of many sequences, each with its own length.

    Committing rows of a slot or rolling it back only sets its length; a slot of length 0 is free for another sequence.
    On a CPU the memory of a slot is allocated as its rows are first written.

    Args:
        shape: of the model.
        count: number of slots.
        capacity: most rows of a sequence, those not committed included.
        dtype, device: of keys and values.

    Attributes:
        lengths: committed rows of each slot, ``[slots]`` (int64).
    """

    def __init__(self, shape: Shape, count: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.data = lazy_zeros(memory(shape, capacity, count), dtype, device)
        self.capacity = capacity
        self.lengths = np.zeros(count, dtype=np.int64)

    def batch(self, slots: Sequence[int]) -> SlotBatch:
        """Return the cache of a forward whose batch entry i is the sequence in ``slots[i]``.

        Raises:
            ValueError: there is no slot, one does not exist, or one is given twice.
        """
        return SlotBatch(self, slots)


class SlotBatch:
    """Some slots as the cache of one forward: new row j of batch entry i is row ``lengths[i] + j`` of its slot.

    A row sees the committed rows of its slot and the new rows of its entry up to itself. A forward commits nothing, so
    entries with fewer rows than others are padded on the right with any ids.

    Attributes:
        owner: the slots; their lengths at the time of the forward count.
        slots: the slot of each entry, ``[batch]`` (int64).
    """

    def __init__(self, owner: Slots, slots: Sequence[int]):
        count = len(owner.lengths)
        if not len(slots) or len(set(slots)) < len(slots) or not all(0 <= slot < count for slot in slots):
            raise ValueError(f"a batch needs one or more different slots below {count}, not {list(slots)}")
        self.owner, self.data = owner, owner.data
        self.slots = torch.tensor(slots, dtype=torch.int64, device=self.data.device)

    @property
    def lengths(self) -> np.ndarray:
        """Committed rows of every entry, ``[batch]`` (int64)."""
        lengths: np.ndarray = self.owner.lengths[self.slots.cpu().numpy()]
        return lengths

    def check(self, x: Tensor, seen: Tensor | None, padding: Tensor | None) -> None:
        """Raise ValueError if new rows x ``[batch, n, hidden]`` do not fit, or if they have a mask, which slots do not
        take."""
        entries, n = x.shape[:2]
        if seen is not None or padding is not None:
            raise ValueError("rows of slots are causal and padded on the right; leave out seen and padding")
        if entries != len(self.slots):
            raise ValueError(f"rows of {entries} sequences were given for {len(self.slots)} slots")
        for slot, length in zip(self.slots.tolist(), self.lengths.tolist(), strict=True):
            if length + n > self.owner.capacity:
                raise ValueError(f"{n} rows after the {length} of slot {slot} do not fit its {self.owner.capacity}")

    def place(self, n: int, seen: Tensor | None, padding: Tensor | None) -> CachePlace:
        """Return where ``n`` new rows of each entry are written and what they see; the rest of the arguments is
        None."""
        lengths, device = self.lengths, self.data.device
        rows = torch.from_numpy(lengths[:, None] + np.arange(n)).to(device)
        columns = int(lengths.max()) + n
        hidden = torch.arange(columns, device=device) > rows[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=self.data.dtype, device=device).masked_fill_(hidden, float("-inf"))
        return CachePlace(rows, columns, mask[:, None])


def memory(shape: Shape, capacity: int, sequences: int) -> tuple[int, ...]:
    """Return the sizes ``[2, layers, sequences, kv_heads, rows, head_dim]`` of a cache, the rows in whole blocks."""
    return 2, shape.layers, sequences, shape.kv_heads, -(-capacity // BLOCK) * BLOCK, shape.head_dim


def lazy_zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros that on a CPU take memory only as they are written, unlike ``torch.zeros``."""
    if device.type != "cpu" or not math.prod(size):
        return torch.zeros(size, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(size) * dtype.itemsize, access=mmap.ACCESS_COPY)
    return torch.frombuffer(pages, dtype=dtype).view(size)


class MaskBuffer:
    """Additive masks for tree rows after a prefix of any length.

    The buffer is zero except for the tree's block at its right end. The mask for a prefix of any length is a window on
    it, so that only the block is ever written.
    """

    def __init__(self, rows: int, columns: int, capacity: int, dtype: torch.dtype, device: torch.device):
        rows, columns = max(rows, 64), max(columns, 128)
        self.capacity = capacity
        self.buffer = torch.zeros(1, 1, rows, capacity + columns, dtype=dtype, device=device)

    def fits(self, rows: int, columns: int) -> bool:
        """Return whether a block of this size fits the buffer."""
        return rows <= self.buffer.shape[2] and columns <= self.buffer.shape[3] - self.capacity

    def window(self, prefix: int, seen: Tensor) -> Tensor:
        """Return the mask ``[1, 1, n, prefix + m]`` for ``seen`` ``[n, m]`` (bool) after ``prefix`` visible rows."""
        n, m = seen.shape
        block = self.buffer[0, 0, :n, self.capacity : self.capacity + m]
        block.fill_(float("-inf")).masked_fill_(seen, 0.0)
        window = self.buffer[:, :, :n, self.capacity - prefix : self.capacity + m]
        return window if window.device.type == "cpu" else window.clone()  # CUDA kernels need aligned rows


def padding_mask(padding: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return a causal additive mask ``[batch, 1, rows, columns]`` that also hides ``padding`` ``[batch]`` columns on
    the left.

    The lowest finite number stands for minus infinity, so that the attention of a padding row, which sees nothing, is
    not NaN.
    """
    column = torch.arange(columns, device=padding.device)
    row = torch.arange(columns - rows, columns, device=padding.device)
    hidden = (column[None, None, :] < padding[:, None, None]) | (column[None, None, :] > row[None, :, None])
    mask = torch.zeros(hidden.shape, dtype=dtype, device=padding.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
