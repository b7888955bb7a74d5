"""A decoder-only transformer over a preallocated cache: Llama, Mistral, Qwen2 and Qwen3.

One forward serves prefill, plain decoding, tree verification and batched generation. It runs any contiguous range of
layers and can return the hidden states that enter chosen layers, which drafters read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from spec_envs.decoding.model import integers
from spec_envs.decoding.model.cache import KVCache, SlotBatch, Slots
from spec_envs.decoding.model.graphs import graphed
from spec_envs.decoding.model.lora import Additions
from spec_envs.decoding.model.precision import Precision, not_in_blocks
from spec_envs.decoding.model.rope import Rope
from spec_envs.decoding.model.rows import Outputs, Rows
from spec_envs.decoding.model.shape import Shape, part
from spec_envs.decoding.weights.blocks import Blocks, dense
from spec_envs.decoding.weights.tensors import EMBEDDING, OUTPUT, fitting


class Transformer:
    """A causal language model for inference.

    Args:
        config: a transformers config of one of ``shape.ARCHITECTURES``.
        weights: state dict with Hugging Face's names (``model.layers.0.self_attn.q_proj.weight``, …), stored in any way;
            where ``dtype`` is not ``"q4"``, blocks are made dense one layer after the other.
        dtype, device: in which the model is computed, see ``precision.DTYPES``; ``"int8"`` means weights in int8 and
            each row of activations quantised by itself, ``"q4"`` the blocks of a GGUF file as they are stored.
        outputs: number of output rows; by default the size of the vocabulary.
        embedding: that of another model, to be shared; by default the one in ``weights``.

    Attributes:
        dtype: its name.
        fingerprint: identifies the weights, whatever dtype they are computed in.
        weight_bytes: bytes of weights that a forward reads: every layer and the output rows.
        embedding: ``[vocab, hidden]`` in the dtype of the cache, or the product of which it is the weight.

    Raises:
        ValueError: the architecture is not supported, the weights do not belong to the config, or the model cannot be
            computed in ``dtype``.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        weights: Mapping[str, Tensor | Blocks],
        dtype: str | torch.dtype,
        device: str | torch.device,
        outputs: int | None = None,
        embedding: Tensor | integers.Linear | None = None,
    ):
        self.config, self.shape = config, Shape.from_config(config)
        self.precision, self.device = Precision(dtype), torch.device(device)
        precision, modules, self.dtype = self.precision, self.precision.modules, self.precision.name
        self.rope = Rope(config, self.shape.head_dim, self.shape.context, precision.hidden, self.device)
        self.fingerprint = fingerprint(weights)
        shared = () if embedding is None else (EMBEDDING,)
        own = fitting(config, self.shape, weights, self.shape.vocab if outputs is None else outputs, shared)
        if precision.blocks and (reason := not_in_blocks(own)):
            raise ValueError(reason)
        matrices = [weight for name, weight in own.items() if len(weight.shape) == 2 and name != EMBEDDING]
        self.weight_bytes = sum(map(precision.weight_bytes, matrices))
        self.layers = graphed(
            modules.Layers(LayerWeights(own, self.shape, precision, self.device), self.shape), self.device
        )
        self.norm = modules.RMSNorm(precision.cast(dense(own["model.norm.weight"]), self.device), self.shape.norm_eps)
        self.tied = embedding is None and own[OUTPUT] is own[EMBEDDING]
        output = precision.taken(own[OUTPUT], self.device)
        self.head = modules.Head(output, self.norm)
        if embedding is None:
            read = output if self.tied else precision.taken(own[EMBEDDING], self.device)
            if isinstance(read, Blocks):
                embedding = self.head.linear if self.tied else integers.Linear(read)
            else:
                embedding = read.to(precision.cache)
        self.embedding: Tensor | integers.Linear = embedding

    def cache(self, capacity: int, batch: int = 1) -> KVCache:
        """Return an empty cache for ``batch`` sequences of at most ``capacity`` rows."""
        return KVCache(self.shape, capacity, self.precision.cache, self.device, batch)

    def slots(self, count: int, capacity: int) -> Slots:
        """Return ``count`` empty slots for sequences of at most ``capacity`` rows, each with its own length."""
        return Slots(self.shape, count, capacity, self.precision.cache, self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states ``[..., hidden]`` of token ids ``[...]``."""
        return embedded(ids, self.embedding).to(self.precision.hidden)

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

    def output_rows(self, ids: Tensor) -> Tensor:
        """Return the output rows ``[n, hidden]`` of ids ``[n]``."""
        rows: Tensor = embedded(ids, self.embedding) if self.tied else self.head.linear.rows(ids)
        return rows

    def output_weight(self) -> Tensor:
        """Return the output rows ``[vocab, hidden]``; a copy where they are packed."""
        weight: Tensor = self.embedding_weight() if self.tied else self.head.linear.dense()
        return weight

    def embedding_weight(self) -> Tensor:
        """Return the embedding ``[vocab, hidden]``; a copy where it is packed."""
        return self.embedding if isinstance(self.embedding, Tensor) else self.embedding.dense()


def embedded(ids: Tensor, embedding: Tensor | integers.Linear) -> Tensor:
    """Return the rows ``[..., hidden]`` of ids ``[...]``; see ``Transformer.embedding``."""
    return F.embedding(ids, embedding) if isinstance(embedding, Tensor) else embedding.rows(ids)


class LayerWeights(Sequence[dict[str, Tensor | Blocks]]):
    """The weights of each layer as the modules take them; what has to be made dense exists while it is used."""

    def __init__(
        self, weights: Mapping[str, Tensor | Blocks], shape: Shape, precision: Precision, device: torch.device
    ):
        self.stored = [part(weights, f"model.layers.{i}.") for i in range(shape.layers)]
        self.precision, self.device = precision, device

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, i: int) -> dict[str, Tensor | Blocks]:  # type: ignore[override]
        return {name: self.precision.taken(weight, self.device) for name, weight in self.stored[i].items()}


def fingerprint(weights: Mapping[str, Tensor | Blocks], samples: int = 64) -> str:
    """Return a digest of about ``samples`` numbers of every tensor of a model."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        at = torch.arange(0, weight.shape.numel(), max(1, weight.shape.numel() // samples))
        if isinstance(weight, Blocks):
            rows, row = torch.unique(at // weight.shape[1], return_inverse=True)
            some = weight.rows(rows)[row, at % weight.shape[1]]
        else:
            some = weight.detach().reshape(-1)[at.to(weight.device)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]
