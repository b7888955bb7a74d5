"""Low-rank adapters (LoRA, arXiv 2106.09685), which add to a target's products while its weights stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spec_envs.decoding.model.shape import Shape

PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Added(NamedTuple):
    """Additions to the products of a layer, as pairs of ``down`` ``[r, in]`` and ``up`` ``[r, out]`` (scale included).

    Attributes:
        qkv: added to queries, keys and values side by side, or None.
        out: added to the attention's output, or None.
    """

    qkv: tuple[Tensor, Tensor] | None
    out: tuple[Tensor, Tensor] | None


@dataclass
class Additions:
    """Additions to every layer of a target, ready for a forward.

    Attributes:
        layers: for each layer its additions, or None.
        structures: their description for the kernels, once it has been made.
    """

    layers: list[Added | None]
    structures: Any = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in order of layer and product."""
        pairs = [pair for layer in self.layers if layer is not None for pair in layer if pair is not None]
        return [tensor for pair in pairs for tensor in pair]

    def to(self, dtype: torch.dtype) -> Additions:
        """Return the same additions in another dtype; gradients flow through the conversion."""
        return self._each(lambda tensor: tensor.to(dtype))

    def frozen(self, dtype: torch.dtype) -> Additions:
        """Return a contiguous copy without gradients in the dtype of a forward."""
        return self._each(lambda tensor: tensor.detach().to(dtype, copy=True).contiguous())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Additions:
        def both(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if pair is None else (change(pair[0]), change(pair[1]))

        return Additions([None if a is None else Added(both(a.qkv), both(a.out)) for a in self.layers])

    def become(self, other: Additions) -> Additions:
        """Copy the numbers of ``other`` into these tensors, whose addresses graphs and kernels know, and return them.

        Where the shapes differ ``other`` itself is returned.
        """
        mine, theirs = self.tensors(), other.tensors()
        if [t.shape for t in mine] != [t.shape for t in theirs]:
            return other
        for old, new in zip(mine, theirs, strict=True):
            old.copy_(new)
        return self


class LowRank(nn.Module):
    """``alpha / rank · (x Aᵀ) Bᵀ``, which is added to a product; it is zero at first, since B is.

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
        """Draw A as peft does, and set B to 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the addition ``[..., outputs]`` for x ``[..., inputs]``."""
        return F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


class LayersLoRA(nn.Module):
    """Low-rank additions to attention products of a range of layers.

    Args:
        shape: of the target.
        layers: which of its layers.
        rank, alpha: see ``LowRank``.
        products: names among ``PRODUCTS``; queries and values by default, as in the paper.

    Raises:
        ValueError: a product is unknown, or there is none.
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
        self.low_ranks: Mapping[str, LowRank] = nn.ModuleDict(  # type: ignore[assignment]  # its values are modules
            {key(layer, name): LowRank(*self.widths[name], rank, alpha) for layer in layers for name in self.products}
        )

    def parts(self) -> Iterator[tuple[int, str, LowRank]]:
        """Yield layer, product and addition of each part."""
        for layer in self.range:
            for name in self.products:
                yield layer, name, self.low_ranks[key(layer, name)]

    def added(self, layer: int) -> Added:
        """Return the additions to a layer; gradients flow from them to the parameters."""
        return Added(self._joined(layer, PRODUCTS[:3]), self._joined(layer, PRODUCTS[3:]))

    def _joined(self, layer: int, names: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Join the additions to products of one input, whose outputs are side by side; None if there are none."""
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        before, whole = 0, sum(self.widths[name][1] for name in names)
        for name in names:
            width = self.widths[name][1]
            if name in self.products:
                low_rank = self.low_ranks[key(layer, name)]
                downs.append(low_rank.lora_A)
                ups.append(F.pad(low_rank.lora_B.T * low_rank.scale, (before, whole - before - width)))
            before += width
        return (torch.cat(downs), torch.cat(ups)) if downs else None


def key(layer: int, name: str) -> str:
    """Return the name of an addition's module, which may not contain a dot."""
    return f"{layer}-{name}"


def additions(parts: Sequence[LayersLoRA], layers: int) -> Additions:
    """Return the additions of several ranges to a target of ``layers`` layers, with gradients where they are
    enabled."""
    of: list[Added | None] = [None] * layers
    for part in parts:
        for layer in part.range:
            of[layer] = part.added(layer)
    return Additions(of)
