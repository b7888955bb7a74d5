"""The new rows of a forward, as every stack of layers takes them."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from spec_envs.decoding.model.cache import KVCache, SlotBatch
from spec_envs.decoding.model.lora import Additions
from spec_envs.decoding.model.rope import Rope

Outputs = tuple[Tensor, list[Tensor]]  # hidden states [batch, n, hidden], and captured inputs in order of layer


class Rows(NamedTuple):
    """New rows of one sequence or of a batch, and what a stack of layers needs to compute them.

    Attributes:
        x: hidden states ``[batch, n, hidden]`` that enter the first of ``layers``.
        cache: where the layers read earlier rows and write these, after the committed ones.
        rope, positions: rotary tables, and the positions ``[batch, n]`` of the rows in them.
        seen, padding: which columns the rows see, see ``KVCache.mask``; both are None with slots.
        layers: which layers run; None means all.
        capture: layers whose input is returned.
        entering: what the first layer's attention reads instead of the norm of x, ``[batch, n, width]``.
        added: what low-rank adapters add to the products of the layers; the weights stay as they are.
    """

    x: Tensor
    cache: KVCache | SlotBatch
    rope: Rope
    positions: Tensor
    seen: Tensor | None = None
    padding: Tensor | None = None
    layers: range | None = None
    capture: Collection[int] = ()
    entering: Tensor | None = None
    added: Additions | None = None
