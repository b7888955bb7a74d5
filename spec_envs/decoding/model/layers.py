"""Decoder layers in bfloat16, float16 or float32, with torch's own operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_envs.decoding.model.cache import CachePlace
from spec_envs.decoding.model.linear import Linear
from spec_envs.decoding.model.lora import Added, Additions
from spec_envs.decoding.model.rope import Rope, rotate
from spec_envs.decoding.model.rows import Outputs, Rows
from spec_envs.decoding.model.shape import Shape


class RMSNorm:
    """Root-mean-square norm (arXiv 1910.07467) with a gain."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Head:
    """The final norm and the output rows, from hidden states to logits.

    Args:
        weight: output rows ``[vocab, hidden]``.
        norm: applied to the hidden states first.
    """

    def __init__(self, weight: Tensor, norm: RMSNorm):
        self.linear, self.norm = Linear(weight), norm

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits ``[..., vocab]`` of hidden states ``[..., hidden]``."""
        return self.linear(self.norm(x))

    def argmax(self, x: Tensor) -> Tensor:
        """Return the most probable token ``[...]`` after each of the hidden states ``[..., hidden]``."""
        return self(x).argmax(-1)


class Layers:
    """A stack of decoder layers.

    Args:
        weights: of each layer, by name without the layer's prefix (``self_attn.q_proj.weight``, …).
        shape: head counts; the width that the first layer's attention reads follows from the weights.
    """

    def __init__(self, weights: Sequence[dict[str, Tensor]], shape: Shape):
        self.layers = [Layer(w, shape) for w in weights]

    def __call__(self, rows: Rows) -> Outputs:
        """Run layers on new rows, which are written to the cache after the committed ones but do not join them.

        Returns:
            Hidden states ``[batch, n, hidden]``, and the captured inputs in order of layer.
        """
        return self.run(rows, rows.cache.place(rows.x.shape[1], rows.seen, rows.padding))

    def run(self, rows: Rows, place: CachePlace) -> Outputs:
        """Run layers on new rows whose ``place`` in the cache is given (instead of ``rows.seen`` and
        ``rows.padding``)."""
        x, entering, captured = rows.x, rows.entering, []
        cache, added, tables = rows.cache, rows.added, rows.rope.at(rows.positions)
        for i in rows.layers if rows.layers is not None else range(len(self.layers)):
            if i in rows.capture:
                captured.append(x)
            memory = Memory(cache.data[0, i], cache.data[1, i], cache.slots, place.rows, place.columns)
            x = self.layers[i](x, memory, tables, place.mask, added.layers[i] if added else None, entering)
            entering = None
        return x, captured

    def read(self, x: Tensor, rope: Rope, layers: range | None = None, added: Additions | None = None) -> Tensor:
        """Read whole texts ``[batch, n, hidden]``, padded on the right, without a cache.

        Gradients flow where the weights are ordinary tensors (``Linear`` packs those in bfloat16 on a CPU).

        Returns:
            Hidden states ``[batch, n, hidden]``.
        """
        tables = rope.at(torch.arange(x.shape[1], device=x.device)[None])
        for i in layers if layers is not None else range(len(self.layers)):
            x = self.layers[i](x, None, tables, None, added.layers[i] if added else None)
        return x


class Memory(NamedTuple):
    """A layer's keys and values, and where new rows are written.

    Attributes:
        keys, values: ``[batch, kv_heads, capacity, head_dim]``, or with slots ``[all slots, …]``.
        slots: the slot of each sequence ``[batch]``, or None.
        rows: the rows to write, or with slots ``[batch, n]``.
        columns: how many rows are read, from the first one on.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor | None
    rows: slice | Tensor
    columns: int

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values of new rows ``[batch, n, kv_heads, head_dim]``; return all that these rows read,
        ``[batch, kv_heads, columns, head_dim]``."""
        if self.slots is None:
            self.keys[:, :, self.rows], self.values[:, :, self.rows] = keys.transpose(1, 2), values.transpose(1, 2)
            return self.keys[:, :, : self.columns], self.values[:, :, : self.columns]
        self.keys[self.slots[:, None], :, self.rows] = keys
        self.values[self.slots[:, None], :, self.rows] = values
        return self.keys[self.slots, :, : self.columns], self.values[self.slots, :, : self.columns]


class Layer:
    """One decoder layer: attention and, where the weights have it, feed-forward, with fused q/k/v and gate/up
    products."""

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

    def __call__(
        self,
        x: Tensor,
        memory: Memory | None,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        added: Added | None,
        entering: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states ``[batch, n, hidden]`` after this layer.

        Args:
            x: the hidden states before it.
            memory: earlier keys and values; None where the rows see each other only.
            tables: rotary tables ``[…, n, head_dim]``.
            mask: additive mask; None where rows are causal.
            added: what a low-rank adapter adds to the attention's products.
            entering: what the attention reads instead of the norm of x, ``[batch, n, width]``.
        """
        x = x + self.attend(self.input_norm(x) if entering is None else entering, memory, tables, mask, added)
        return x + self.feed(self.post_norm(x)) if self.feeds else x

    def attend(
        self,
        x: Tensor,
        memory: Memory | None,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        added: Added | None,
    ) -> Tensor:
        """Return the attention ``[batch, n, hidden]`` of rows ``[batch, n, width]`` to the memory and to these rows."""
        s, n = self.shape, x.shape[1]
        joined = self.qkv(x) if added is None else plus(self.qkv(x), added.qkv, x)
        heads = joined.view(*joined.shape[:2], s.heads + 2 * s.kv_heads, s.head_dim)
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
        """Return the SwiGLU feed-forward (arXiv 2002.05202) of ``[batch, n, hidden]``."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


def most_probable(logits: Tensor, extra: Tensor | None, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most probable outputs of each row of logits ``[n, a]`` and ``[n, b]`` (or None) side by side.

    Returns:
        Their indices ``[n, width]`` and log-probabilities ``[n, width]``, best first, and the entropy ``[n]`` in nats.
    """
    both = logits if extra is None else torch.cat([logits, extra], -1)
    log_probabilities = both.float().log_softmax(-1)
    best, index = log_probabilities.topk(width, dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities.clamp(min=-100.0)).sum(-1)
    return index, best.clamp(max=0.0), entropy


def plus(y: Tensor, low_rank: tuple[Tensor, Tensor] | None, x: Tensor) -> Tensor:
    """Add to ``y``, a product of ``x``, what an adapter of ``down`` ``[r, in]`` and ``up`` ``[r, out]`` adds to it."""
    return y if low_rank is None else y + F.linear(x, low_rank[0]) @ low_rank[1]


def feeds(weights: Mapping[str, object]) -> bool:
    """Return whether a layer of these weights has a feed-forward part."""
    return "mlp.down_proj.weight" in weights


def fused(weights: dict[str, Tensor], names: list[str]) -> Linear:
    """Return one ``Linear`` that computes several projections of the same input side by side."""
    return Linear(*joined(weights, names))


def joined(weights: dict[str, Tensor], names: list[str]) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of several projections of the same input, one below the other."""
    biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
    return torch.cat([weights[f"{name}.weight"] for name in names]), torch.cat(biases) if biases else None
