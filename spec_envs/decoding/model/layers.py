"""Decoder layers in bfloat16, float16 or float32, with torch's own operators."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_envs.decoding.model.cache import KVCache, SlotBatch
from spec_envs.decoding.model.linear import Linear
from spec_envs.decoding.model.lora import Added, Additions
from spec_envs.decoding.model.rope import Rope, rotate
from spec_envs.decoding.model.shape import Shape


class RMSNorm:
    """Root-mean-square norm with a gain."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Head:
    """Logits of hidden states through the final norm.

    Args:
        weight: ``[vocab, hidden]``.
    """

    def __init__(self, weight: Tensor, norm: RMSNorm):
        self.linear, self.norm = Linear(weight), norm

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` to ``[..., vocab]``."""
        return self.linear(self.norm(x))

    def argmax(self, x: Tensor) -> Tensor:
        """The most probable token of each row, ``[...]``."""
        return self(x).argmax(-1)


class Layers:
    """A stack of decoder layers.

    Args:
        weights: of each layer, by name without its prefix (``self_attn.q_proj.weight``, …).
        shape: head counts; the width of what the first layer's attention reads follows from the weights.
    """

    def __init__(self, weights: Sequence[dict[str, Tensor]], shape: Shape):
        self.layers = [Layer(w, shape) for w in weights]

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
        """Run ``layers`` (all by default) on new rows; they are written to the cache behind its committed ones.

        Args:
            x: hidden states ``[batch, n, hidden]``.
            rope, positions: tables of rotary positions and which of them the rows have, ``[batch, n]``.
            seen, padding: see ``KVCache.mask``; None with slots.
            capture: layers whose input is handed out.
            entering: what the first layer's attention reads instead of the norm of x, ``[batch, n, width]``.
            added: what low-rank adapters add to the products.

        Returns:
            Hidden states ``[batch, n, hidden]`` and the captured inputs, in order of layer.
        """
        rows, columns, mask = cache.place(x.shape[1], seen, padding)
        return self.run(x, cache, rope.at(positions), mask, rows, columns, layers, capture, entering, added)

    def read(self, x: Tensor, rope: Rope, layers: range | None = None, added: Additions | None = None) -> Tensor:
        """Whole texts ``[batch, n, hidden]``, padded on the right, without a cache: gradients flow through, where the
        weights are ordinary tensors (``Linear`` packs those in bfloat16 on a CPU)."""
        tables = rope.at(torch.arange(x.shape[1], device=x.device)[None])
        return self.run(x, None, tables, None, slice(0), 0, layers, (), None, added)[0]

    def run(
        self,
        x: Tensor,
        cache: KVCache | SlotBatch | None,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        rows: slice | Tensor,
        columns: int,
        layers: range | None,
        capture: Collection[int],
        entering: Tensor | None,
        added: Additions | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The layers with everything made up: ``tables`` of rotary positions, an additive ``mask``, the ``rows`` of the
        cache to write, and how many of its ``columns`` to read; without a cache rows see those of this call."""
        captured = []
        for i in layers if layers is not None else range(len(self.layers)):
            if i in capture:
                captured.append(x)
            layer = self.layers[i]
            read, entering = layer.input_norm(x) if entering is None else entering, None
            memory = None if cache is None else Memory(cache.data[0, i], cache.data[1, i], cache.slots, rows, columns)
            x = x + layer.attend(read, memory, tables, mask, added.layers[i] if added else None)
            if layer.feeds:
                x = x + layer.feed(layer.post_norm(x))
        return x, captured


class Memory(NamedTuple):
    """Where a layer's keys and values go: ``rows`` of ``[batch, kv_heads, capacity, d]``, of which the first ``columns``
    are read; with ``slots`` ``[batch]`` these are the sequences, and ``rows`` is ``[batch, n]``."""

    keys: Tensor
    values: Tensor
    slots: Tensor | None
    rows: slice | Tensor
    columns: int

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write those of new rows ``[batch, n, kv_heads, d]``; all that they read, ``[batch, kv_heads, columns, d]``."""
        if self.slots is None:
            self.keys[:, :, self.rows], self.values[:, :, self.rows] = keys.transpose(1, 2), values.transpose(1, 2)
            return self.keys[:, :, : self.columns], self.values[:, :, : self.columns]
        self.keys[self.slots[:, None], :, self.rows] = keys
        self.values[self.slots[:, None], :, self.rows] = values
        return self.keys[self.slots, :, : self.columns], self.values[self.slots, :, : self.columns]


class Layer:
    """Attention and feed-forward (where there is one) of one decoder layer, with fused q/k/v and gate/up products."""

    def __init__(self, weights: dict[str, Tensor], shape: Shape):
        self.shape = shape
        self.input_norm = RMSNorm(weights["input_layernorm.weight"], shape.norm_eps)
        self.qkv = fused(weights, [f"self_attn.{p}_proj" for p in "qkv"])
        self.out = fused(weights, ["self_attn.o_proj"])
        self.feeds = feeds(weights)
        if self.feeds:
            self.post_norm = RMSNorm(weights["post_attention_layernorm.weight"], shape.norm_eps)
            self.gate_up = fused(weights, ["mlp.gate_proj", "mlp.up_proj"])
            self.down = fused(weights, ["mlp.down_proj"])
        self.qk_gain = None
        if "self_attn.q_norm.weight" in weights:  # Qwen3
            q, k = weights["self_attn.q_norm.weight"], weights["self_attn.k_norm.weight"]
            self.qk_gain = torch.cat([q.expand(shape.heads, -1), k.expand(shape.kv_heads, -1)])

    def attend(
        self,
        x: Tensor,
        memory: Memory | None,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        added: Added | None = None,
    ) -> Tensor:
        """Attention of ``x`` ``[batch, n, width]`` to what is in memory and, up to itself, to these rows."""
        s, n = self.shape, x.shape[1]
        joined = self.qkv(x) if added is None else plus(self.qkv(x), added.qkv, x)
        heads = joined.unflatten(-1, (s.heads + 2 * s.kv_heads, s.head_dim))
        qk, v = heads[:, :, : s.heads + s.kv_heads], heads[:, :, s.heads + s.kv_heads :]
        if self.qk_gain is not None:
            qk = F.rms_norm(qk, (s.head_dim,), None, s.norm_eps) * self.qk_gain
        qk = rotate(qk, tables)
        if memory is None:
            keys, values = qk[:, :, s.heads :].transpose(1, 2), v.transpose(1, 2)
        else:
            keys, values = memory.extend(qk[:, :, s.heads :], v)
        attended = F.scaled_dot_product_attention(
            qk[:, :, : s.heads].transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and n > 1,
            enable_gqa=s.heads != s.kv_heads,
        )
        read = attended.transpose(1, 2).flatten(-2)
        return self.out(read) if added is None else plus(self.out(read), added.out, read)

    def feed(self, x: Tensor) -> Tensor:
        """SwiGLU feed-forward."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


def most_probable(logits: Tensor, extra: Tensor | None, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the logits ``[n, a]`` and ``[n, b]`` side by side: indices and log-probabilities ``[n, width]`` of the largest,
    and the entropy in nats ``[n]``."""
    both = logits if extra is None else torch.cat([logits, extra], -1)
    log_probabilities = both.float().log_softmax(-1)
    best, index = log_probabilities.topk(width, dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities.clamp(min=-100.0)).sum(-1)
    return index, best.clamp(max=0.0), entropy


def plus(y: Tensor, low_rank: tuple[Tensor, Tensor] | None, x: Tensor) -> Tensor:
    """A product ``y`` of ``x`` and what an adapter adds to it: ``down`` ``[r, in]``, then ``up`` ``[r, out]``."""
    return y if low_rank is None else y + F.linear(x, low_rank[0]) @ low_rank[1]


def feeds(weights: dict[str, Tensor]) -> bool:
    """Whether a layer of these weights has a feed-forward part."""
    return "mlp.down_proj.weight" in weights


def fused(weights: dict[str, Tensor], names: list[str]) -> Linear:
    """One Linear over the outputs of several projections of the same input."""
    return Linear(*joined(weights, names))


def joined(weights: dict[str, Tensor], names: list[str]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several projections of the same input, one below the other."""
    biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
    return torch.cat([weights[f"{name}.weight"] for name in names]), torch.cat(biases) if biases else None
