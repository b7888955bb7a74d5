"""CUDA graphs of a stack of layers, one per number of rows: a replay costs one launch instead of hundreds.

A graph has fixed shapes and addresses. Therefore the indices at which new rows are written to the cache are in a
tensor, and attention reads a bucket of columns, of which a mask hides those that have not been written yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spec_envs.decoding.model.cache import CachePlace, SlotBatch
from spec_envs.decoding.model.layers import Layers
from spec_envs.decoding.model.lora import Additions
from spec_envs.decoding.model.rope import Rope
from spec_envs.decoding.model.rows import Outputs, Rows

MAX_ROWS = 96  # of a decoding forward; more rows, or an empty cache, are a prompt's, for which launches matter little
BUCKET = 256  # graphs are captured for multiples of so many columns

Record = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


def graphed(layers: Any, device: torch.device) -> Any:
    """Return a stack of layers that runs through graphs on a CUDA device, and ``layers`` itself elsewhere."""
    return GraphedLayers(layers) if device.type == "cuda" else layers


@functools.cache
def memory_pool() -> Any:
    """Return the memory pool that all graphs share."""
    return torch.cuda.graph_pool_handle()


def record_cuda(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Capture ``run`` in a CUDA graph; return a function that replays it, and the outputs that a replay overwrites."""
    side: torch.cuda.Stream = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries initialise themselves in the first runs
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory_pool()):  # the graphs share it: they are replayed one after another
        outputs = run()
    return graph.replay, outputs


class GraphedLayers:
    """A stack of layers, called like ``Layers``; a few rows of one sequence run through a graph, others directly.

    Args:
        layers: the stack.
        record: captures a function, as ``record_cuda`` does.
    """

    def __init__(self, layers: Layers, record: Record = record_cuda):
        self.layers, self.record = layers, record

    def __call__(self, rows: Rows) -> Outputs:
        """Run layers on new rows; see ``Layers``."""
        cache, (batch, n, _) = rows.cache, rows.x.shape
        direct = batch > 1 or rows.padding is not None or n > MAX_ROWS
        if direct or isinstance(cache, SlotBatch) or cache.length == 0:
            return self.layers(rows)
        columns = min(-(-(cache.length + n) // BUCKET) * BUCKET, cache.data.shape[4])
        alike = rows.layers, tuple(rows.capture), rows.entering is None, id(rows.added)
        key = (cache.data.data_ptr(), n, columns, *alike)
        if key not in cache.graphs:
            cache.graphs[key] = Graph(self, rows, cache.length, columns)
        graph: Graph = cache.graphs[key]
        return graph.replay(rows, cache.length)

    def read(self, x: Tensor, rope: Rope, layers: range | None = None, added: Additions | None = None) -> Tensor:
        """Read whole texts without a cache; see ``Layers``."""
        return self.layers.read(x, rope, layers, added)


class Graph:
    """One captured forward and the tensors that it reads.

    Args:
        owner: the layers, and how they are captured.
        rows: an example of the rows that will be replayed; only their values may change.
        length: committed rows of the cache.
        columns: how many columns of the cache are read.
    """

    def __init__(self, owner: GraphedLayers, rows: Rows, length: int, columns: int):
        n, device = rows.x.shape[1], rows.x.device
        self.added = rows.added  # kept alive, for the key of this graph holds its identity
        self.x, self.entering = rows.x.clone(), None if rows.entering is None else rows.entering.clone()
        self.written = torch.arange(n, device=device) + length
        self.positions = torch.zeros(1, n, dtype=torch.long, device=device)
        self.mask = torch.zeros(1, 1, n, columns, dtype=rows.cache.data.dtype, device=device)
        fixed = rows._replace(x=self.x, positions=self.positions, entering=self.entering)
        place = CachePlace(self.written, columns, self.mask)
        self.run, self.outputs = owner.record(lambda: owner.layers.run(fixed, place))

    def replay(self, rows: Rows, length: int) -> Outputs:
        """Return the outputs of new rows after ``length`` committed ones."""
        n, device, seen = rows.x.shape[1], rows.x.device, rows.seen
        seen = torch.ones(n, n, dtype=torch.bool, device=device).tril_() if seen is None else seen
        prefix, end = length + n - seen.shape[1], length + n
        self.x.copy_(rows.x)
        if self.entering is not None and rows.entering is not None:
            self.entering.copy_(rows.entering)
        self.positions.copy_(rows.positions)
        torch.arange(length, end, out=self.written)
        self.mask.fill_(float("-inf"))[..., :prefix] = 0
        self.mask[..., prefix:end].masked_fill_(seen, 0)
        self.run()
        hidden, captured = self.outputs
        return hidden.clone(), [state.clone() for state in captured]
