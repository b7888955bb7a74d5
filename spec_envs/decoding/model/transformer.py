"""A decoder-only transformer over a preallocated cache: Llama, Mistral, Qwen2 and Qwen3.

One forward serves prefill, plain decoding, tree verification and batched generation. It runs any contiguous range of
layers and can return the hidden states that enter chosen layers, which drafters read.
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
from spec_envs.decoding.model.rows import Outputs, Rows
from spec_envs.decoding.model.shape import Shape, part
from spec_envs.decoding.weights.tensors import EMBEDDING, OUTPUT, fitting


class Precision:
    """The modules and dtypes with which a model of a given dtype is computed.

    Attributes:
        modules: ``layers`` or ``int8``, which define ``RMSNorm``, ``Linear``, ``Layers`` and ``Head``.
        weights: dtype of the weights that are passed to them; None means the checkpoint's own.
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
        """Return a weight in the dtype that the modules take, on ``device``.

        Raises:
            ValueError: it holds numbers that are too large for float16.
        """
        cast = weight.to(device, self.weights or weight.dtype)
        if cast.dtype == torch.float16 and not torch.isfinite(cast).all():
            raise ValueError(
                f"the weights reach {weight.abs().max():.3g}, which float16 does not hold; pass dtype bfloat16 or "
                "float32"
            )
        return cast


class Transformer:
    """A causal language model for inference.

    Args:
        config: a transformers config of one of ``shape.ARCHITECTURES``.
        weights: state dict with Hugging Face's names (``model.layers.0.self_attn.q_proj.weight``, …).
        dtype, device: in which the model is computed; ``torch.int8`` means weights in int8 and each row of activations
            quantised by itself.
        outputs: number of output rows; by default the size of the vocabulary.

    Attributes:
        fingerprint: identifies the weights, whatever dtype they are computed in.

    Raises:
        ValueError: the architecture is not supported, the weights do not belong to the config, or the model cannot be
            computed in ``dtype``.
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
        """Return an empty cache for ``batch`` sequences of at most ``capacity`` rows."""
        return KVCache(self.shape, capacity, self.precision.cache, self.device, batch)

    def slots(self, count: int, capacity: int) -> Slots:
        """Return ``count`` empty slots for sequences of at most ``capacity`` rows, each with its own length."""
        return Slots(self.shape, count, capacity, self.precision.cache, self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states ``[..., hidden]`` of token ids ``[...]``."""
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
    ) -> Outputs:
        """Run ``layers`` (all by default) on new rows after the cache's committed ones.

        The rows are written to the cache but not committed: set ``cache.length`` or call ``cache.keep``, and for a
        batch of slots set the slots' ``lengths``.

        Args:
            x: hidden states ``[batch, n, hidden]`` that enter the first of ``layers``.
            cache: where earlier rows are read and these are written.
            positions: rotary positions ``[batch, n]``, less than the context in padding rows, too.
            seen: ``[n, m]`` (bool), which of the last m columns each row sees, all columns before them being visible;
                by default each row sees the new rows up to itself.
            padding: number of columns on the left of each sequence that no row sees, ``[batch]``. With slots ``seen``
                and ``padding`` are None.
            layers: which layers run.
            capture: layers whose input is returned; the number of layers means the output of the last one.
            added: what low-rank adapters add to the products of the layers; the weights stay as they are.

        Returns:
            Hidden states ``[batch, n, hidden]`` before the final norm, and the captured inputs in order of layer.

        Raises:
            ValueError: the rows do not fit the cache.
        """
        cache.check(x, seen, padding)
        rows = Rows(x, cache, self.rope, positions, seen, padding, layers, capture, added=added)
        x, captured = self.layers(rows)
        if self.shape.layers in capture and (layers is None or layers.stop == self.shape.layers):
            captured.append(x)
        return x, captured

    def output_weight(self) -> Tensor:
        """Return the output rows ``[vocab, hidden]``; a copy where they are packed and not the embedding's."""
        weight: Tensor = self.embedding if self.tied else self.head.linear.dense()
        return weight


def fingerprint(weights: dict[str, Tensor], samples: int = 64) -> str:
    """Return a digest of about ``samples`` numbers of every tensor of a model."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].detach().reshape(-1)
        some = flat[:: max(1, len(flat) // samples)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weights[name].shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
