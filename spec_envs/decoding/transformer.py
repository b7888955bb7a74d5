"""A decoder-only transformer over a preallocated cache: Llama, Mistral, Qwen2 and Qwen3.

One forward serves prefill, plain decoding, tree verification and batched generation. It runs any contiguous
range of layers and can hand out the hidden states that enter chosen layers, which is what drafters read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spec_envs.decoding.linear import Linear

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("linear", "llama3", "yarn")  # the others depend on the sequence length


@dataclass(frozen=True)
class Shape:
    """The numbers of an architecture, read from a transformers config."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Shape:
        """Read ``config``; raises ValueError for an architecture this forward does not compute."""
        if config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"architecture {config.model_type!r} is not supported; use a model of one of: {', '.join(ARCHITECTURES)}"
            )
        if config.hidden_act != "silu":
            raise ValueError(f"activation {config.hidden_act!r} is not supported; expected 'silu'")
        context = config.max_position_embeddings
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True):
            context = min(context, window)  # within the window, sliding attention is plain attention
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            context=context,
            norm_eps=config.rms_norm_eps,
        )


class KVCache:
    """Keys and values of every layer, ``[2, layers, batch, kv_heads, capacity, head_dim]``.

    ``length`` rows are committed. A forward writes behind them; committing rows or rolling back is setting
    ``length``, keeping a path of a tree is one gather.
    """

    def __init__(self, shape: Shape, capacity: int, dtype: torch.dtype, device: torch.device, batch: int = 1):
        self.data = torch.zeros(
            2, shape.layers, batch, shape.kv_heads, capacity, shape.head_dim, dtype=dtype, device=device
        )
        self.capacity = capacity
        self.length = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Commit the rows ``length + r`` for r in ``rows`` (ascending) as the next rows of the sequence."""
        start, count = self.length, len(rows)
        if list(rows) != list(range(count)):
            index = torch.tensor(rows, device=self.data.device) + start
            self.data[..., start : start + count, :] = self.data.index_select(4, index)
        self.length += count

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences of the batch."""
        self.data = self.data[:, :, sequences].contiguous()


class AncestorMask:
    """Additive mask for tree rows behind a committed prefix.

    One buffer of zeros with the tree's block at its right end; the mask for a prefix of any length is a window
    on it, so nothing but the block itself is ever written.
    """

    def __init__(self, rows: int, columns: int, capacity: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self.buffer = torch.zeros(1, 1, rows, capacity + columns, dtype=dtype, device=device)

    def window(self, prefix: int, visible: Tensor) -> Tensor:
        """Mask ``[1, 1, n, prefix + m]`` for ``visible`` ``[n, m]`` (bool) behind ``prefix`` visible rows."""
        n, m = visible.shape
        block = self.buffer[0, 0, :n, self.capacity : self.capacity + m]
        block.fill_(float("-inf")).masked_fill_(visible, 0.0)
        window = self.buffer[:, :, :n, self.capacity - prefix : self.capacity + m]
        return window if window.device.type == "cpu" else window.clone()  # CUDA kernels want aligned rows


class RMSNorm:
    """Root-mean-square norm with a gain."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rope:
    """Rotary position tables (cosine, and sine with the sign of the half it multiplies), computed in float32."""

    def __init__(self, config: PretrainedConfig, head_dim: int, length: int, dtype: torch.dtype, device: torch.device):
        parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if kind == "default":
            theta: float = parameters.get("rope_theta") or 10_000.0
            frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
            scale = 1.0
        elif kind in STATIC_ROPE:
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        else:
            raise ValueError(f"rope type {kind!r} is not supported; expected default, {', '.join(STATIC_ROPE)}")
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies.float())
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos = torch.cat([cos, cos], -1).to(device, dtype)
        self.sin = torch.cat([-sin, sin], -1).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables ``[..., 1, head_dim]`` for integer ``positions`` ``[...]``."""
        return self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary positions to ``[..., heads, head_dim]`` (RoFormer, arXiv 2104.09864, in the half-split layout)."""
    cos, sin = rope
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos, swapped, sin)


class Layer:
    """Attention and feed-forward of one decoder layer, with fused q/k/v and gate/up products.

    Args:
        weights: tensors by name without the layer's prefix (``self_attn.q_proj.weight``, …).
        shape: head counts; the input width follows from the weights.
    """

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
        start: int,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """Attention of rows ``x`` ``[batch, n, width]``, written to and read from ``[batch, kv_heads, capacity, d]``."""
        s, n = self.shape, x.shape[1]
        heads = self.qkv(x).unflatten(-1, (s.heads + 2 * s.kv_heads, s.head_dim))
        qk, v = heads[:, :, : s.heads + s.kv_heads], heads[:, :, s.heads + s.kv_heads :]
        if self.qk_gain is not None:
            qk = F.rms_norm(qk, (s.head_dim,), None, s.norm_eps) * self.qk_gain
        qk = rotate(qk, rope)
        keys[:, :, start : start + n] = qk[:, :, s.heads :].transpose(1, 2)
        values[:, :, start : start + n] = v.transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            qk[:, :, : s.heads].transpose(1, 2),
            keys[:, :, : start + n],
            values[:, :, : start + n],
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=s.heads != s.kv_heads,
        )
        return self.out(attended.transpose(1, 2).flatten(-2))

    def feed(self, x: Tensor) -> Tensor:
        """SwiGLU feed-forward."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


def fused(weights: dict[str, Tensor], names: list[str]) -> Linear:
    """One Linear over the outputs of several projections of the same input."""
    biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
    weight = torch.cat([weights[f"{name}.weight"] for name in names])
    return Linear(weight, torch.cat(biases) if biases else None)


class Transformer:
    """A causal language model for inference.

    Args:
        config: a transformers config of one of ``ARCHITECTURES``.
        weights: state dict with Hugging Face's names (``model.layers.0.self_attn.q_proj.weight``, …).
        dtype, device: what to compute in and where.

    Raises:
        ValueError: another architecture, or weights that do not belong to the config.
    """

    def __init__(
        self, config: PretrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype, device: str | torch.device
    ):
        self.config, self.shape = config, Shape.from_config(config)
        self.dtype, self.device = dtype, torch.device(device)
        weights = {name: tensor.to(self.device, dtype) for name, tensor in weights.items()}
        try:
            self.embedding = weights["model.embed_tokens.weight"]
            self.layers = [Layer(part(weights, f"model.layers.{i}."), self.shape) for i in range(self.shape.layers)]
            self.norm = RMSNorm(weights["model.norm.weight"], self.shape.norm_eps)
            self.tied = config.tie_word_embeddings or "lm_head.weight" not in weights
            self.lm_head = Linear(self.embedding if self.tied else weights["lm_head.weight"])
        except torch.OutOfMemoryError:
            raise
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the weights do not fit their config.json: {error}") from error
        self.rope = Rope(config, self.shape.head_dim, self.shape.context, dtype, self.device)

    def cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for ``batch`` sequences of at most ``capacity`` rows."""
        return KVCache(self.shape, capacity, self.dtype, self.device, batch)

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states ``[..., hidden]`` of token ids ``[...]``."""
        return F.embedding(ids, self.embedding)

    def forward(
        self,
        x: Tensor,
        cache: KVCache,
        positions: Tensor,
        mask: Tensor | None = None,
        layers: range | None = None,
        capture: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Run ``layers`` (all by default) on new rows behind the cache's committed ones.

        Rows are written to the cache but not committed: set ``cache.length`` or call ``cache.keep``.

        Args:
            x: hidden states ``[batch, n, hidden]`` entering the first of ``layers``.
            cache: where earlier rows are read and these are written.
            positions: rotary positions ``[batch, n]``.
            mask: additive ``[batch or 1, 1, n, length + n]``; None for one row, or for an empty cache (causal).
            capture: layers whose input is handed out.

        Returns:
            Hidden states ``[batch, n, hidden]`` (before the final norm) and the captured inputs, in order of layer.
        """
        start, n = cache.length, x.shape[1]
        if start + n > cache.capacity:
            raise ValueError(f"{start + n} rows do not fit a cache of {cache.capacity}")
        if mask is None and n > 1 and start > 0:
            raise ValueError("several rows behind a prefix need a mask")
        rope = self.rope.at(positions)
        captured = []
        for i in layers if layers is not None else range(self.shape.layers):
            if i in capture:
                captured.append(x)
            layer = self.layers[i]
            keys, values = cache.data[0, i], cache.data[1, i]
            x = x + layer.attend(layer.input_norm(x), keys, values, start, rope, mask, mask is None and n > 1)
            x = x + layer.feed(layer.post_norm(x))
        return x, captured

    def head(self, x: Tensor) -> Tensor:
        """Logits ``[..., vocab]`` of hidden states ``[..., hidden]``."""
        return self.lm_head(self.norm(x))

    def output_weight(self) -> Tensor:
        """The head's weight ``[vocab, hidden]``; a copy where it is packed and not the embedding's."""
        return self.embedding if self.tied else self.lm_head.dense()


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, without it."""
    found = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not found:
        raise KeyError(f"{prefix}*")
    return found
