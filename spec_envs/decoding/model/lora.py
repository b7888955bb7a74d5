"""Low-rank adapters (LoRA, arXiv 2106.09685): what is added to a target's products while its weights stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spec_envs.decoding.model.shape import Shape

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Added(NamedTuple):
    """What is added to the products of a layer, as ``down`` ``[r, in]`` and ``up`` ``[r, out]`` (the scale within): to
    queries, keys and values side by side, and to the output of attention. None is nothing."""

    qkv: tuple[Tensor, Tensor] | None
    out: tuple[Tensor, Tensor] | None


@dataclass
class Additions:
    """What is added to every layer of a target, ready for a forward; ``structures`` is how the int8 kernels take it."""

    layers: list[Added | None]
    structures: Any = None

    def tensors(self) -> list[Tensor]:
        """All that there is, in order."""
        pairs = [pair for layer in self.layers if layer is not None for pair in layer if pair is not None]
        return [tensor for pair in pairs for tensor in pair]

    def to(self, dtype: torch.dtype) -> Additions:
        """The same in another dtype; gradients flow through."""
        return self._each(lambda tensor: tensor.to(dtype))

    def frozen(self, dtype: torch.dtype) -> Additions:
        """The same numbers without gradients, contiguous, in memory of their own and in the dtype of a forward."""
        return self._each(lambda tensor: tensor.detach().to(dtype, copy=True).contiguous())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Additions:
        def both(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if pair is None else (change(pair[0]), change(pair[1]))

        return Additions([None if a is None else Added(both(a.qkv), both(a.out)) for a in self.layers])

    def become(self, other: Additions) -> Additions:
        """These with the numbers of the others, at the addresses that graphs and kernels know; the others where they have
        other shapes."""
        mine, theirs = self.tensors(), other.tensors()
        if [t.shape for t in mine] != [t.shape for t in theirs]:
            return other
        for old, new in zip(mine, theirs, strict=True):
            old.copy_(new)
        return self


class LowRank(nn.Module):
    """``y += alpha / rank · (x Aᵀ) Bᵀ``; nothing at first, for B is 0.

    Args:
        inputs, outputs: widths of the product.
        rank, alpha: as in peft's ``LoraConfig`` (``r``, ``lora_alpha``).
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank
        self.initialise(torch.Generator().manual_seed(0))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """A as peft draws it, B 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


class LayersLoRA(nn.Module):
    """Low-rank additions to attention products of a range of layers.

    Args:
        shape: of the target.
        layers: which of its layers.
        rank, alpha: see ``LowRank``.
        products: names among ``PRODUCTS``; queries and values by default, as in the paper.

    Raises:
        ValueError: another product, or none.
    """

    def __init__(
        self, shape: Shape, layers: range, rank: int, alpha: float, products: Sequence[str] = ("q_proj", "v_proj")
    ):
        super().__init__()
        if not products or (unknown := set(products) - set(PRODUCTS)):
            raise ValueError(f"products are {list(products)}; expected some of {', '.join(PRODUCTS)}, not {unknown}")
        self.range, self.rank, self.alpha = layers, rank, alpha
        self.products = [name for name in PRODUCTS if name in products]
        attended, kept = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.widths = {
            "q_proj": (shape.hidden, attended),
            "k_proj": (shape.hidden, kept),
            "v_proj": (shape.hidden, kept),
            "o_proj": (attended, shape.hidden),
        }
        self.low_ranks = nn.ModuleDict(
            {key(layer, name): LowRank(*self.widths[name], rank, alpha) for layer in layers for name in self.products}
        )

    def parts(self) -> Iterator[tuple[int, str, LowRank]]:
        """Layer, product and addition of each."""
        for layer in self.range:
            for name in self.products:
                yield layer, name, self._of(layer, name)

    def added(self, layer: int) -> Added:
        """What is added to a layer; gradients flow from it to the parameters."""
        return Added(self._joined(layer, PRODUCTS[:3]), self._joined(layer, PRODUCTS[3:]))

    def _joined(self, layer: int, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """The additions to products of the same input, whose outputs are side by side, as one."""
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        before, whole = 0, sum(self.widths[name][1] for name in names)
        for name in names:
            width = self.widths[name][1]
            if name in self.products:
                low_rank = self._of(layer, name)
                downs.append(low_rank.lora_A)
                ups.append(F.pad(low_rank.lora_B.T * low_rank.scale, (before, whole - before - width)))
            before += width
        return (torch.cat(downs), torch.cat(ups)) if downs else None

    def _of(self, layer: int, name: str) -> LowRank:
        found = self.low_ranks[key(layer, name)]
        assert isinstance(found, LowRank)
        return found


def key(layer: int, name: str) -> str:
    """A module's name, which may not hold a point."""
    return f"{layer}-{name}"


def additions(parts: Sequence[LayersLoRA], layers: int) -> Additions:
    """What several ranges of a target of so many layers add together; with gradients, where they are enabled."""
    of: list[Added | None] = [None] * layers
    for part in parts:
        for layer in part.range:
            of[layer] = part.added(layer)
    return Additions(of)
