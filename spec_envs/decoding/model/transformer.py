"""A decoder-only transformer over a preallocated cache: Llama, Mistral, Qwen2 and Qwen3.

One forward serves prefill, plain decoding, tree verification and batched generation. It runs any contiguous
range of layers and can hand out the hidden states that enter chosen layers, which is what drafters read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from spec_envs.decoding.model import int8, layers
from spec_envs.decoding.model.cache import KVCache, SlotBatch, Slots
from spec_envs.decoding.model.graphs import graphed
from spec_envs.decoding.model.lora import Additions
from spec_envs.decoding.model.rope import Rope
from spec_envs.decoding.model.shape import Shape, part
from spec_envs.decoding.weights.tensors import EMBEDDING, OUTPUT, fitting


class Precision:
    """What a dtype means for the parts of a model.

    Attributes:
        modules: where ``RMSNorm``, ``Linear``, ``Layers`` and ``Head`` come from.
        weights: dtype in which weights are handed to them; None is their own.
        hidden: dtype of hidden states and logits.
        cache: dtype of keys, values and the embedding.
    """

    def __init__(self, dtype: torch.dtype):
        self.modules: ModuleType
        self.weights: torch.dtype | None
        if dtype == torch.int8:
            self.modules, self.weights, self.hidden, self.cache = int8, None, torch.float32, torch.bfloat16
        else:
            self.modules, self.weights, self.hidden, self.cache = layers, dtype, dtype, dtype

    def cast(self, weight: Tensor, device: torch.device) -> Tensor:
        """A weight as the parts want it.

        Raises:
            ValueError: it holds numbers that float16 does not.
        """
        cast = weight.to(device, self.weights or weight.dtype)
        if cast.dtype == torch.float16 and not torch.isfinite(cast).all():
            raise ValueError(
                f"the weights reach {weight.abs().max():.3g}, which float16 does not hold; pass dtype bfloat16 or float32"
            )
        return cast


class Transformer:
    """A causal language model for inference.

    Args:
        config: a transformers config of one of ``ARCHITECTURES``.
        weights: state dict with Hugging Face's names (``model.layers.0.self_attn.q_proj.weight``, …).
        dtype, device: what to compute in and where; ``torch.int8`` is weights in int8 and rows quantised one by one.
        outputs: how many output rows there are (default: those of the vocabulary).

    Attributes:
        fingerprint: tells weights apart, whatever dtype they are computed in.

    Raises:
        ValueError: another architecture, weights that do not belong to the config, or a model that ``dtype`` does not
            compute.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: dict[str, Tensor],
        dtype: torch.dtype,
        device: str | torch.device,
        outputs: int | None = None,
    ):
        self.config, self.shape = config, Shape.from_config(config)
        self.dtype, self.device = dtype, torch.device(device)
        self.precision = precision = Precision(dtype)
        modules = precision.modules
        self.rope = Rope(config, self.shape.head_dim, self.shape.context, precision.hidden, self.device)
        self.fingerprint = fingerprint(weights)
        own = fitting(config, self.shape, weights, self.shape.vocab if outputs is None else outputs)
        output = own.pop(OUTPUT)
        self.tied = output is own[EMBEDDING]
        own = {name: precision.cast(tensor, self.device) for name, tensor in own.items()}
        output = own[EMBEDDING] if self.tied else precision.cast(output, self.device)
        self.embedding = own[EMBEDDING].to(precision.cache)
        parts = [part(own, f"model.layers.{i}.") for i in range(self.shape.layers)]
        self.layers = graphed(modules.Layers(parts, self.shape), self.device)
        self.norm = modules.RMSNorm(own["model.norm.weight"], self.shape.norm_eps)
        self.head = modules.Head(output, self.norm)

    def cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for ``batch`` sequences of at most ``capacity`` rows."""
        return KVCache(self.shape, capacity, self.precision.cache, self.device, batch)

    def slots(self, count: int, capacity: int) -> Slots:
        """``count`` empty slots for sequences of at most ``capacity`` rows, each with a length of its own."""
        return Slots(self.shape, count, capacity, self.precision.cache, self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states ``[..., hidden]`` of token ids ``[...]``."""
        return F.embedding(ids, self.embedding).to(self.precision.hidden)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | SlotBatch,
        positions: Tensor,
        seen: Tensor | None = None,
        padding: Tensor | None = None,
        layers: range | None = None,
        capture: Collection[int] = (),
        added: Additions | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run ``layers`` (all by default) on new rows behind the cache's committed ones.

        Rows are written to the cache but not committed: set ``cache.length`` or call ``cache.keep``, and for a batch of
        slots set the slots' ``lengths``.

        Args:
            x: hidden states ``[batch, n, hidden]`` entering the first of ``layers``.
            cache: where earlier rows are read and these are written.
            positions: rotary positions ``[batch, n]``, below the context in padding rows, too.
            seen: ``[n, m]`` (bool), which of the last m columns each row sees, all columns before them being visible;
                by default each sees the new rows up to itself.
            padding: ``[batch]`` columns on the left that nobody sees. With slots both are None.
            capture: layers whose input is handed out; the number of layers means the output of the last one.
            added: what low-rank adapters add to the products of the layers; the weights stay as they are.

        Returns:
            Hidden states ``[batch, n, hidden]`` (before the final norm) and the captured inputs, in order of layer.

        Raises:
            ValueError: rows that do not fit the cache.
        """
        cache.check(x, seen, padding)
        x, captured = self.layers(x, cache, self.rope, positions, seen, padding, layers, capture, added=added)
        if self.shape.layers in capture and (layers is None or layers.stop == self.shape.layers):
            captured.append(x)
        return x, captured

    def output_weight(self) -> Tensor:
        """The head's weight ``[vocab, hidden]``; a copy where it is packed and not the embedding's."""
        return self.embedding if self.tied else self.head.linear.dense()


def fingerprint(weights: dict[str, Tensor], samples: int = 64) -> str:
    """A digest of some numbers of every tensor of a model."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].detach().reshape(-1)
        some = flat[:: max(1, len(flat) // samples)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weights[name].shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
