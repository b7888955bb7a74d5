"""Decoder layers in int8 on a CPU: weights quantised per output channel, every row of activations by itself.

Integer sums do not depend on what else is in the batch, and the kernels add everything else in one order per row, so
a row has the same bits alone, in a tree and in a batch: speculative decoding in int8 is exactly plain decoding.
The classes are those of ``layers.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ctypes import Array, byref, c_void_p

import torch
from torch import Tensor
from transformers import PretrainedConfig

from spec_envs.decoding.cache import KVCache, SlotBatch
from spec_envs.decoding.kernels import threads
from spec_envs.decoding.kernels.bindings import CAdded, CCache, CLayer, CMatrix, CTables, address, floats, library
from spec_envs.decoding.kernels.packing import COLUMNS, TILE, interleaved, packed, padded, unpacked
from spec_envs.decoding.layers import feeds, joined
from spec_envs.decoding.lora import Additions
from spec_envs.decoding.rope import Rope
from spec_envs.decoding.shape import Shape


def computes(config: PretrainedConfig) -> bool:
    """Whether the kernels compute a model of these widths."""
    shape = Shape.from_config(config)
    return not (shape.head_dim % COLUMNS or shape.hidden % TILE or config.intermediate_size % TILE)


class RMSNorm:
    """Root-mean-square norm with a gain, in float32."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps, self.library = floats(weight), eps, library()

    def __call__(self, x: Tensor) -> Tensor:
        x = floats(x)
        out, width = torch.empty_like(x), x.shape[-1]
        self.library.rms_norm(x.data_ptr(), self.weight.data_ptr(), x.numel() // width, width, self.eps, out.data_ptr())
        return out


class Linear:
    """``y = x Wᵀ + b`` with the weight in int8 per output and the rows of x in int8 per row.

    Args:
        weight: ``[out, in]``, in a multiple of 16.
        bias: ``[out]`` or None.
        norm: applied to x first.

    Raises:
        ValueError: a width that the kernels do not compute.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, norm: RMSNorm | None = None):
        self.outputs, self.inputs = weight.shape
        if self.inputs % TILE:
            raise ValueError(
                f"dtype 'int8' needs widths that are multiples of {TILE}, not {self.inputs}; pass another dtype"
            )
        self.norm, self.library = norm, library()
        self.weight, self.scale = packed(weight)
        self.bias = None if bias is None else padded(floats(bias)[None], 1, COLUMNS)[0]
        self.matrix = CMatrix(address(self.weight), address(self.scale), address(self.bias), self.inputs, self.outputs)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        x, stride = floats(x), len(self.scale)
        out = torch.empty(*x.shape[:-1], stride)
        self.library.linear(
            byref(self.matrix), x.data_ptr(), x.numel() // self.inputs, *self._norm(), out.data_ptr(), stride, threads()
        )
        return out[..., : self.outputs]

    def argmax(self, x: Tensor) -> Tensor:
        """The index of the largest output of each row, ``[...]``."""
        x = floats(x)
        out = torch.empty(x.shape[:-1], dtype=torch.int64)
        self.library.linear_argmax(
            byref(self.matrix), x.data_ptr(), x.numel() // self.inputs, *self._norm(), out.data_ptr(), threads()
        )
        return out

    def dense(self) -> Tensor:
        """The quantised weight ``[out, in]`` as floats."""
        return unpacked(self.weight, self.scale)[: self.outputs, : self.inputs]

    def _norm(self) -> tuple[int | None, float]:
        return (None, 0.0) if self.norm is None else (self.norm.weight.data_ptr(), self.norm.eps)


class Head:
    """Logits of hidden states through the final norm, or the most probable token of each.

    Args:
        weight: ``[vocab, hidden]``.
    """

    def __init__(self, weight: Tensor, norm: RMSNorm):
        self.linear = Linear(weight, norm=norm)
        self.argmax = self.linear.argmax

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to ``[..., vocab]``."""
        return self.linear(x)


class Layers:
    """A stack of decoder layers; see ``layers.Layers``.

    Raises:
        ValueError: a width that the kernels do not compute.
    """

    def __init__(self, weights: Sequence[dict[str, Tensor]], shape: Shape):
        if shape.head_dim % COLUMNS or shape.hidden % TILE:
            raise ValueError(
                f"dtype 'int8' needs heads of a multiple of {COLUMNS} and a hidden size of a multiple of {TILE}, "
                f"not {shape.head_dim} and {shape.hidden}; pass another dtype"
            )
        self.shape, self.library = shape, library()
        self.kept: list[Linear | Tensor] = []  # what the structures point to
        self.structures = (CLayer * len(weights))(*(self._structure(w) for w in weights))

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
    ) -> tuple[Tensor, list[Tensor]]:
        """Run ``layers`` (all by default) on new rows; see ``layers.Layers``."""
        layers = layers if layers is not None else range(len(self.structures))
        memory = c_cache(cache)
        if x.shape[0] != memory.batch or positions.shape != x.shape[:2]:
            raise IndexError(f"rows {tuple(x.shape)}, positions {tuple(positions.shape)} and cache do not fit together")
        x = floats(x).clone()
        captured = {i: torch.empty_like(x) for i in sorted(capture) if i in layers}
        pointers = (c_void_p * len(self.structures))(*(address(captured.get(i)) for i in range(len(self.structures))))
        positions = positions.contiguous()
        seen = None if seen is None else seen.contiguous()
        entering = None if entering is None else floats(entering)
        self.library.forward(
            self.structures,
            layers.start,
            layers.stop,
            x.data_ptr(),
            address(entering),
            byref(memory),
            x.shape[1],
            positions.data_ptr(),
            byref(c_tables(rope)),
            address(seen),
            0 if seen is None else seen.shape[1],
            address(padding),
            pointers,
            c_added(added),
            threads(),
        )
        return x, list(captured.values())

    def _structure(self, weights: dict[str, Tensor]) -> CLayer:
        s = self.shape
        linears = [
            Linear(*joined(weights, [f"self_attn.{p}_proj" for p in "qkv"])),
            Linear(*joined(weights, ["self_attn.o_proj"])),
        ]
        attended, read = s.heads * s.head_dim, linears[0].inputs
        expected = [(read, (s.heads + 2 * s.kv_heads) * s.head_dim), (attended, s.hidden)]
        if feeds(weights):
            gate, up = (joined(weights, [f"mlp.{name}_proj"]) for name in ("gate", "up"))
            bias = None if gate[1] is None or up[1] is None else interleaved(gate[1], up[1])
            linears += [Linear(interleaved(gate[0], up[0]), bias), Linear(*joined(weights, ["mlp.down_proj"]))]
            expected += [(s.hidden, 2 * linears[3].inputs), (linears[3].inputs, s.hidden)]
        widths = [(linear.inputs, linear.outputs) for linear in linears]
        if widths != expected or read not in (s.hidden, 2 * s.hidden):
            raise RuntimeError(f"a layer has products of {widths} inputs and outputs, expected {expected}")
        names = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        gains = [floats(weights[f"{name}.weight"]) if f"{name}.weight" in weights else None for name in names]
        for gain, width in zip(gains, (s.hidden, s.hidden, s.head_dim, s.head_dim), strict=True):
            if gain is not None and len(gain) != width:
                raise RuntimeError(f"a norm has {len(gain)} gains, expected {width}")
        self.kept += [*linears, *(gain for gain in gains if gain is not None)]
        matrices = [linear.matrix for linear in linears] + [CMatrix()] * (4 - len(linears))
        return CLayer(*matrices, *map(address, gains), s.hidden, s.heads, s.kv_heads, s.head_dim, s.norm_eps)


def c_cache(cache: KVCache | SlotBatch) -> CCache:
    """The cache as the kernels take it."""
    _, layers, sequences, _, rows, _ = cache.data.shape
    memory = (cache.data.data_ptr(), layers, sequences, rows)
    if isinstance(cache, KVCache):
        return CCache(*memory, sequences, cache.length)
    return CCache(*memory, len(cache.slots), 0, cache.slots.data_ptr(), cache.owner.lengths.ctypes.data)


def c_added(added: Additions | None) -> Array[CAdded] | None:
    """The additions as the kernels take them, made once for each."""
    if added is None:
        return None
    if added.structures is None:

        def low_rank(pair: tuple[Tensor, Tensor] | None) -> tuple[int | None, int | None, int]:
            return (None, None, 0) if pair is None else (address(pair[0]), address(pair[1]), len(pair[0]))

        nothing = (None, None, 0)
        added.structures = (CAdded * len(added.layers))(
            *(CAdded(*(nothing + nothing if a is None else low_rank(a.qkv) + low_rank(a.out))) for a in added.layers)
        )
    return added.structures


def c_tables(rope: Rope) -> CTables:
    """The tables as the kernels take them."""
    return CTables(rope.cos.data_ptr(), rope.sin.data_ptr(), len(rope.cos))


def most_probable(logits: Tensor, extra: Tensor | None, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ``layers.most_probable``."""
    n, index = len(logits), torch.empty(len(logits), width, dtype=torch.int64)
    log_probability, entropy = torch.empty(n, width), torch.empty(n)
    extra = None if extra is None else floats(extra)
    library().most_probable(
        logits.data_ptr(), logits.shape[1], logits.stride(0), address(extra), 0 if extra is None else extra.shape[1],
        n, width, index.data_ptr(), log_probability.data_ptr(), entropy.data_ptr(), threads(),
    )  # fmt: skip
    return index, log_probability, entropy


def read_all(data: Tensor) -> None:
    """Read every byte of ``data`` once, on all threads, as fast as memory gives them."""
    library().read_all(data.data_ptr(), data.nbytes, threads())
