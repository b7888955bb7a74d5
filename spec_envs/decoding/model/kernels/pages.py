"""Memory in huge pages, where the system has them: reading all weights then looks up a page for every 2 MB, not 4 KB."""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading

import torch
from torch import Tensor

HUGE = 2**21  # bytes of a huge page
CHUNK = 32 * HUGE  # bytes that are reserved at a time; they take memory as they are written
LINE = 64  # bytes to a multiple of which tensors are aligned


class Chunk:
    """Reserved memory, freed with the last tensor in it.

    Args:
        size: in bytes, that tensors can take.
    """

    def __init__(self, size: int):
        self.map = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # a system without huge pages
                self.map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.used = -self.bytes.data_ptr() % HUGE

    def take(self, size: int) -> Tensor | None:
        """Return ``size`` bytes that no other tensor has, or None if there are not as many."""
        begin = self.used
        if begin + size > len(self.bytes):
            return None
        self.used = begin + (size + LINE - 1) // LINE * LINE
        return self.bytes[begin : begin + size]


class Pages:
    """Puts tensors side by side, so that small ones do not take a huge page each."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.chunk: Chunk | None = None

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor in huge pages."""
        with self.lock:
            place = None if self.chunk is None else self.chunk.take(tensor.nbytes)
            if place is None:
                self.chunk = Chunk(max(CHUNK, tensor.nbytes))
                place = self.chunk.take(tensor.nbytes)
                assert place is not None
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


in_huge_pages = Pages().copy
