"""Decoder layers in bfloat16, float16 or float32, with torch's own operators."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_envs.decoding.cache import KVCache, SlotBatch
from spec_envs.decoding.linear import Linear
from spec_envs.decoding.rope import Rope, rotate
from spec_envs.decoding.shape import Shape


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
    ) -> tuple[Tensor, list[Tensor]]:
        """Run ``layers`` (all by default) on new rows; they are written to the cache behind its committed ones.

        Args:
            x: hidden states ``[batch, n, hidden]``.
            rope, positions: tables of rotary positions and which of them the rows have, ``[batch, n]``.
            seen, padding: see ``KVCache.mask``; None with slots.
            capture: layers whose input is handed out.
            entering: what the first layer's attention reads instead of the norm of x, ``[batch, n, width]``.

        Returns:
            Hidden states ``[batch, n, hidden]`` and the captured inputs, in order of layer.
        """
        rows, columns, mask = cache.place(x.shape[1], seen, padding)
        return self.run(x, cache, rope.at(positions), mask, rows, columns, layers, capture, entering)

    def run(
        self,
        x: Tensor,
        cache: KVCache | SlotBatch,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        rows: slice | Tensor,
        columns: int,
        layers: range | None,
        capture: Collection[int],
        entering: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The layers with everything made up: ``tables`` of rotary positions, an additive ``mask``, the ``rows`` of the
        cache to write, and how many of its ``columns`` to read."""
        captured = []
        for i in layers if layers is not None else range(len(self.layers)):
            if i in capture:
                captured.append(x)
            layer = self.layers[i]
            read, entering = layer.input_norm(x) if entering is None else entering, None
            x = x + layer.attend(read, cache.data[0, i], cache.data[1, i], cache.slots, rows, columns, tables, mask)
            x = x + layer.feed(layer.post_norm(x))
        return x, captured


class Layer:
    """Attention and feed-forward of one decoder layer, with fused q/k/v and gate/up products."""

    def __init__(self, weights: dict[str, Tensor], shape: Shape):
        self.shape = shape
        self.input_norm = RMSNorm(weights["input_layernorm.weight"], shape.norm_eps)
        self.post_norm = RMSNorm(weights["post_attention_layernorm.weight"], shape.norm_eps)
        self.qkv = fused(weights, [f"self_attn.{p}_proj" for p in "qkv"])
        self.out = fused(weights, ["self_attn.o_proj"])
        self.gate_up = fused(weights, ["mlp.gate_proj", "mlp.up_proj"])
        self.down = fused(weights, ["mlp.down_proj"])
        self.qk_gain = None
        if "self_attn.q_norm.weight" in weights:  # Qwen3
            q, k = weights["self_attn.q_norm.weight"], weights["self_attn.k_norm.weight"]
            self.qk_gain = torch.cat([q.expand(shape.heads, -1), k.expand(shape.kv_heads, -1)])

    def attend(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor | None,
        rows: slice | Tensor,
        columns: int,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """Attention of ``x`` ``[batch, n, width]``, written to ``rows`` of ``[batch, kv_heads, capacity, d]`` and reading
        its first ``columns``; with ``slots`` ``[batch]`` these are the sequences, and ``rows`` is ``[batch, n]``."""
        s, n = self.shape, x.shape[1]
        heads = self.qkv(x).unflatten(-1, (s.heads + 2 * s.kv_heads, s.head_dim))
        qk, v = heads[:, :, : s.heads + s.kv_heads], heads[:, :, s.heads + s.kv_heads :]
        if self.qk_gain is not None:
            qk = F.rms_norm(qk, (s.head_dim,), None, s.norm_eps) * self.qk_gain
        qk = rotate(qk, tables)
        if slots is None:
            keys[:, :, rows] = qk[:, :, s.heads :].transpose(1, 2)
            values[:, :, rows] = v.transpose(1, 2)
            keys, values = keys[:, :, :columns], values[:, :, :columns]
        else:
            keys[slots[:, None], :, rows] = qk[:, :, s.heads :]
            values[slots[:, None], :, rows] = v
            keys, values = keys[slots, :, :columns], values[slots, :, :columns]
        attended = F.scaled_dot_product_attention(
            qk[:, :, : s.heads].transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and n > 1,
            enable_gqa=s.heads != s.kv_heads,
        )
        return self.out(attended.transpose(1, 2).flatten(-2))

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


def fused(weights: dict[str, Tensor], names: list[str]) -> Linear:
    """One Linear over the outputs of several projections of the same input."""
    return Linear(*joined(weights, names))


def joined(weights: dict[str, Tensor], names: list[str]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several projections of the same input, one below the other."""
    biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
    return torch.cat([weights[f"{name}.weight"] for name in names]), torch.cat(biases) if biases else None
