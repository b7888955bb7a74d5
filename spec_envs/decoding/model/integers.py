"""Decoder layers in whole numbers on a CPU.

A weight that comes as a tensor is quantised to int8 per output, and so is each row of activations by itself (dtype
``"int8"``). A weight that comes as the blocks of a GGUF file is multiplied as it is, and rows are quantised to 16 bits
with a scale for 32 inputs (dtype ``"q4"``).

Integer sums do not depend on what else is in the batch, and the kernels add everything else in one order per row.
Therefore a row has the same bits alone, in a tree and in a batch, and speculative decoding gives exactly the text of
plain decoding. The classes are those of ``layers.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, addressof, byref, c_void_p

import torch
from torch import Tensor
from transformers import PretrainedConfig

from spec_envs.decoding.model.cache import KVCache, SlotBatch
from spec_envs.decoding.model.kernels import threads
from spec_envs.decoding.model.kernels.bindings import (
    BFLOAT16,
    OUTPUTS,
    CAdded,
    CCache,
    CEmbedding,
    CLayer,
    CMatrix,
    CTables,
    address,
    floats,
    library,
)
from spec_envs.decoding.model.kernels.packing import TILE
from spec_envs.decoding.model.layers import feeds
from spec_envs.decoding.model.lora import Additions
from spec_envs.decoding.model.products import Head, Linear, RMSNorm, check, finite, reordered, stacked, uncomputed
from spec_envs.decoding.model.rope import Rope
from spec_envs.decoding.model.rows import Outputs, Rows
from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.weights.blocks import Blocks, dense

__all__ = ["Head", "Layers", "Linear", "RMSNorm", "computes", "most_probable", "read_all"]


def computes(config: PretrainedConfig) -> bool:
    """Return whether the kernels can compute a model of this config.

    Raises:
        ValueError: no dtype can compute it.
    """
    shape = Shape.from_config(config)
    widths = {"head_size": shape.head_dim, "hidden_size": shape.hidden, "intermediate_size": config.intermediate_size}
    return uncomputed(**widths, width=shape.heads * shape.head_dim) is None


class Layers:
    """A stack of decoder layers; see ``layers.Layers``.

    Attributes:
        structures: every layer as the kernels read it.

    Raises:
        ValueError: the kernels cannot compute a width, the weights do not fit together, or are not finite.
    """

    def __init__(self, weights: Sequence[dict[str, Tensor | Blocks]], shape: Shape):
        check(head_size=shape.head_dim, hidden_size=shape.hidden)
        self.shape, self.library = shape, library()
        self.inner: set[int] = set()  # widths within the feed-forward parts
        self.kept: list[Linear | Tensor] = []  # alive while the structures point to them
        self.structures = (CLayer * len(weights))(*(self._structure(w) for w in weights))
        if any(layer.qkv.inputs != shape.hidden for layer in self.structures[1:]):
            raise ValueError(f"a layer after the first one reads another width than the hidden size {shape.hidden}")

    def __call__(self, rows: Rows) -> Outputs:
        """Run layers on new rows; see ``layers.Layers``.

        Raises:
            IndexError: the rows do not fit the cache, the tables or these layers.
        """
        memory, layers = c_cache(rows.cache), self._range(rows)
        self.check_rows(rows, memory.batch)
        read = rows.x if rows.entering is None else rows.entering
        width = self.structures[0].qkv.inputs if layers.start == 0 else self.shape.hidden
        if read.shape != (*rows.x.shape[:2], width):
            raise IndexError(f"entering {list(read.shape)} does not fit what the attention of the first layer reads")
        x, wanted = floats(rows.x).clone(), [i for i in sorted(rows.capture) if i in layers]
        if not layers or not x.numel():
            return x, [x.clone() for _ in wanted]
        captured = {i: torch.empty_like(x) for i in wanted}
        pointers = (c_void_p * len(self.structures))(*(address(captured.get(i)) for i in range(len(self.structures))))
        positions = rows.positions.contiguous()
        seen = None if rows.seen is None else rows.seen.contiguous()
        padding = None if rows.padding is None else rows.padding.contiguous()
        entering = None if rows.entering is None else floats(rows.entering)
        self.library.forward(
            self.structures,
            layers.start,
            layers.stop,
            x.data_ptr(),
            address(entering),
            byref(memory),
            x.shape[1],
            positions.data_ptr(),
            byref(c_tables(rows.rope)),
            address(seen),
            0 if seen is None else seen.shape[1],
            address(padding),
            pointers,
            c_added(rows.added, self.structures),
            threads(),
        )
        return x, list(captured.values())

    def check_rows(self, rows: Rows, batch: int) -> None:
        """Raise IndexError for tensors of other sizes or dtypes than the kernels assume for ``batch`` sequences."""
        x, cache, rope, positions, seen, padding, *_ = rows
        layers, s, n = self._range(rows), self.shape, x.shape[1]
        stop = layers.stop if layers else 0
        _, stored, _, kv_heads, _, head_dim = cache.data.shape
        expected = {
            "rows": (x.shape == (batch, n, s.hidden), x),
            "layers": (
                layers.start >= 0 and layers.step == 1 and stop <= min(len(self.structures), stored),
                cache.data,
            ),
            "cache": (
                (kv_heads, head_dim) == (s.kv_heads, s.head_dim)
                and cache.data.dtype in (torch.bfloat16, torch.float32),
                cache.data,
            ),
            "rotary tables": (rope.cos.shape[1] == s.head_dim and rope.cos.dtype == torch.float32, rope.cos),
            "positions": (positions.shape == (batch, n) and positions.dtype == torch.int64, positions),
            "seen": (seen is None or (seen.shape == (n, seen.shape[-1]) and seen.dtype == torch.bool), seen),
            "padding": (padding is None or (padding.shape == (batch,) and padding.dtype == torch.int64), padding),
        }
        for name, (fits, tensor) in expected.items():
            if not fits:
                size = None if tensor is None else list(tensor.shape)
                raise IndexError(f"{name} {size} do not fit {list(x.shape)} rows of layers {layers}")

    def _range(self, rows: Rows) -> range:
        """Return the layers that run."""
        return rows.layers if rows.layers is not None else range(len(self.structures))

    def _structure(self, weights: dict[str, Tensor | Blocks]) -> CLayer:
        """Quantise the weights of a layer, and describe them to the kernels."""
        s = self.shape
        linears = [
            Linear(*stacked(weights, [f"self_attn.{p}_proj" for p in "qkv"])),
            Linear(*stacked(weights, ["self_attn.o_proj"])),
        ]
        attended, read = s.heads * s.head_dim, linears[0].inputs
        expected = [(read, (s.heads + 2 * s.kv_heads) * s.head_dim), (attended, s.hidden)]
        if feeds(weights):
            both, biases = stacked(weights, ["mlp.gate_proj", "mlp.up_proj"])
            inner = weights["mlp.down_proj.weight"].shape[1]
            check(intermediate_size=inner)
            turns = torch.arange(2 * inner).view(2, -1, TILE).transpose(0, 1).flatten()  # a tile of gate, a tile of up
            linears += [
                Linear(reordered(both, turns), None if biases is None else biases[turns]),
                Linear(*stacked(weights, ["mlp.down_proj"])),
            ]
            expected += [(s.hidden, 2 * linears[3].inputs), (linears[3].inputs, s.hidden)]
            self.inner.add(linears[3].inputs)
        widths = [(linear.inputs, linear.outputs) for linear in linears]
        if widths != expected or read not in (s.hidden, 2 * s.hidden) or len(self.inner) > 1:
            raise ValueError(f"a layer has products of {widths} inputs and outputs, expected {expected}")
        names = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        gains = [finite(dense(weights[f"{name}.weight"])) if f"{name}.weight" in weights else None for name in names]
        for gain, width in zip(gains, (s.hidden, s.hidden, s.head_dim, s.head_dim), strict=True):
            if gain is not None and len(gain) != width:
                raise ValueError(f"a norm has {len(gain)} gains, expected {width}")
        self.kept += [*linears, *(gain for gain in gains if gain is not None)]
        matrices = [linear.matrix for linear in linears] + [CMatrix()] * (4 - len(linears))
        return CLayer(*matrices, *map(address, gains), s.hidden, s.heads, s.kv_heads, s.head_dim, s.norm_eps)


def c_cache(cache: KVCache | SlotBatch) -> CCache:
    """Describe a cache to the kernels."""
    _, layers, sequences, _, rows, _ = cache.data.shape
    memory = (cache.data.data_ptr(), cache.data.itemsize, layers, sequences, rows)
    if isinstance(cache, KVCache):
        return CCache(*memory, sequences, cache.length)
    return CCache(*memory, len(cache.slots), 0, cache.slots.data_ptr(), cache.owner.lengths.ctypes.data)


def c_added(added: Additions | None, layers: Array[CLayer]) -> Array[CAdded] | None:
    """Describe additions to these layers to the kernels, once for each ``Additions``.

    Raises:
        IndexError: the additions belong to another number of layers or have other widths.
    """
    if added is None:
        return None
    if added.structures is None:
        if len(added.layers) != len(layers):
            raise IndexError(f"additions to {len(added.layers)} layers do not fit {len(layers)}")
        structures = (CAdded * len(layers))()
        for structure, layer, addition in zip(structures, layers, added.layers, strict=True):
            for name, pair in ("qkv", addition and addition.qkv), ("out", addition and addition.out):
                if pair is not None:
                    for field, value in zip(("down", "up", "rank"), low_rank(pair, getattr(layer, name)), strict=True):
                        setattr(structure, f"{name}_{field}", value)
        added.structures = structures
    described: Array[CAdded] = added.structures
    return described


def low_rank(pair: tuple[Tensor, Tensor], matrix: CMatrix) -> tuple[int | None, int | None, int]:
    """Return the addresses of ``down`` and ``up`` and the rank of what is added to a product.

    Raises:
        IndexError: they are not contiguous float32 of the product's widths.
    """
    down, up = pair
    sizes = (len(down), matrix.inputs), (len(down), matrix.outputs)
    if (down.shape, up.shape) != sizes or any(t.dtype != torch.float32 or not t.is_contiguous() for t in pair):
        raise IndexError(f"additions {list(down.shape)} and {list(up.shape)} do not fit {sizes} in contiguous float32")
    return address(down), address(up), len(down)


def c_embedding(rows: Tensor | Linear) -> CEmbedding:
    """Describe an embedding ``[vocab, hidden]`` to the kernels: a tensor, or a product whose outputs are the tokens.

    Raises:
        ValueError: a tensor is not contiguous bfloat16.
    """
    if isinstance(rows, Linear):
        return CEmbedding(addressof(rows.matrix), OUTPUTS, rows.outputs)
    if rows.dtype != torch.bfloat16 or not rows.is_contiguous():
        raise ValueError(f"an embedding in {rows.dtype} cannot be read; expected contiguous bfloat16")
    return CEmbedding(rows.data_ptr(), BFLOAT16, len(rows))


def c_tables(rope: Rope) -> CTables:
    """Describe rotary tables to the kernels."""
    return CTables(rope.cos.data_ptr(), rope.sin.data_ptr(), len(rope.cos))


def most_probable(logits: Tensor, extra: Tensor | None, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most probable outputs; see ``layers.most_probable``.

    Raises:
        IndexError: there are fewer outputs than ``width``, or they are not float32.
    """
    both = logits.shape[1] + (0 if extra is None else extra.shape[1])
    if not 1 <= width <= both or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise IndexError(f"{width} of {both} logits in {logits.dtype} cannot be chosen")
    n, index = len(logits), torch.empty(len(logits), width, dtype=torch.int64)
    log_probability, entropy = torch.empty(n, width), torch.empty(n)
    extra = None if extra is None else floats(extra)
    library().most_probable(
        logits.data_ptr(), logits.shape[1], logits.stride(0), address(extra), 0 if extra is None else extra.shape[1],
        n, width, index.data_ptr(), log_probability.data_ptr(), entropy.data_ptr(), threads(),
    )  # fmt: skip
    return index, log_probability, entropy


def read_all(data: Tensor) -> None:
    """Read every byte of ``data`` once, on all threads, as fast as memory delivers them."""
    library().read_all(data.data_ptr(), data.nbytes, threads())
