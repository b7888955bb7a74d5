"""CUDA graphs of a stack of layers, one per number of rows: a replay costs one launch instead of hundreds.

A graph has fixed shapes and addresses. So new rows are written to the cache at indices that lie in a tensor, and
attention reads a bucket of columns of which a mask hides those that are not there yet.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from spec_envs.decoding.model.cache import KVCache, SlotBatch
from spec_envs.decoding.model.layers import Layers
from spec_envs.decoding.model.lora import Additions
from spec_envs.decoding.model.rope import Rope

MAX_ROWS = 96  # of a decoding forward; more, or an empty cache, are a prompt, whose launches do not matter
BUCKET = 256  # columns that one graph more reads

Outputs = tuple[Tensor, list[Tensor]]
Record = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


def graphed(layers: Any, device: torch.device) -> Any:
    """The layers, through graphs where the device is a CUDA device."""
    return GraphedLayers(layers) if device.type == "cuda" else layers


@functools.cache
def memory_pool() -> Any:
    """Memory that the graphs share."""
    return torch.cuda.graph_pool_handle()


def record_cuda(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Capture ``run``; returns what replays it and the outputs that a replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up in the first runs
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory_pool()):  # one for all: they are replayed one after another
        outputs = run()
    return graph.replay, outputs


class GraphedLayers:
    """A stack of layers, called like ``Layers``; few rows of one sequence go through a graph, others directly.

    Args:
        layers: the stack.
        record: captures a function (``record_cuda``).
    """

    def __init__(self, layers: Layers, record: Record = record_cuda):
        self.layers, self.record = layers, record

    def __call__(
        self,
        x: Tensor,
        cache: KVCache | SlotBatch,
        rope: Rope,
        positions: Tensor,
        seen: Tensor | None = None,
        padding: Tensor | None = None,
        layers: range | None = None,
        capture: Collection[int] = (),
        entering: Tensor | None = None,
        added: Additions | None = None,
    ) -> Outputs:
        """See ``Layers``."""
        batch, n = x.shape[:2]
        direct = batch > 1 or padding is not None or n > MAX_ROWS
        if direct or isinstance(cache, SlotBatch) or cache.length == 0:
            return self.layers(x, cache, rope, positions, seen, padding, layers, capture, entering, added)
        columns = min(-(-(cache.length + n) // BUCKET) * BUCKET, cache.data.shape[4])
        key = (cache.data.data_ptr(), n, columns, layers, tuple(capture), entering is None, id(added))
        if key not in cache.graphs:
            cache.graphs[key] = Graph(self, x, cache, rope, columns, layers, capture, entering, added)
        return cache.graphs[key].replay(x, cache.length, positions, seen, entering)

    def read(self, x: Tensor, rope: Rope, layers: range | None = None, added: Additions | None = None) -> Tensor:
        """See ``Layers``."""
        return self.layers.read(x, rope, layers, added)


class Graph:
    """One captured forward and the tensors that it reads."""

    def __init__(
        self,
        owner: GraphedLayers,
        x: Tensor,
        cache: KVCache,
        rope: Rope,
        columns: int,
        layers: range | None,
        capture: Collection[int],
        entering: Tensor | None,
        added: Additions | None,
    ):
        n = x.shape[1]
        self.added = added  # kept, for the key of this graph is its identity
        self.x, self.entering = x.clone(), None if entering is None else entering.clone()
        self.rows = torch.arange(n, device=x.device) + cache.length
        self.positions = torch.zeros(1, n, dtype=torch.long, device=x.device)
        self.mask = torch.zeros(1, 1, n, columns, dtype=cache.data.dtype, device=x.device)
        stack = owner.layers
        self.run, self.outputs = owner.record(
            lambda: stack.run(
                self.x,
                cache,
                rope.at(self.positions),
                self.mask,
                self.rows,
                columns,
                layers,
                capture,
                self.entering,
                added,
            )
        )

    def replay(
        self, x: Tensor, length: int, positions: Tensor, seen: Tensor | None, entering: Tensor | None
    ) -> Outputs:
        """The forward of these rows behind ``length`` committed ones."""
        n = x.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool, device=x.device).tril_() if seen is None else seen
        prefix, end = length + n - seen.shape[1], length + n
        self.x.copy_(x)
        if self.entering is not None and entering is not None:
            self.entering.copy_(entering)
        self.positions.copy_(positions)
        torch.arange(length, end, out=self.rows)
        self.mask.fill_(float("-inf"))[..., :prefix] = 0
        self.mask[..., prefix:end].masked_fill_(seen, 0)
        self.run()
        hidden, captured = self.outputs
        return hidden.clone(), [state.clone() for state in captured]
