"""Rows of a head's layers in training: several texts one after the other, without padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spec_envs.decoding.drafters.eagle.head import EagleHead, EagleLayer
from spec_envs.decoding.model.rope import Rope, rotate
from spec_envs.experiments.drafters.batches import Batch


class HeadRows(nn.Module):
    """The parts of an EAGLE head, applied to rows of texts.

    Args:
        head: the weights.
        embedding: the target's, ``[vocab, hidden]``.
        positions: tokens of the longest text, and the levels that are drafted after it.
    """

    def __init__(self, head: EagleHead, embedding: Tensor, positions: int):
        super().__init__()
        self.head, self.embedding = head, embedding
        self.rope = Rope(head.config, head.config.head_dim, positions, torch.float32, embedding.device)

    def entering(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return what the first layer's attention reads, ``[n, 2·hidden]``: tokens ``[n]`` and states ``[n, hidden]``."""
        layer = self.head.midlayer
        embedded = F.embedding(tokens, self.embedding).to(hidden.dtype)
        return torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], -1)

    def queries(self, layer: EagleLayer, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Return scaled queries ``[n, heads, d]`` of what the attention reads."""
        q = layer.self_attn.q_proj(x).unflatten(-1, (self.head.config.num_attention_heads, -1))
        return rotate(q, rope).to(q.dtype) / math.sqrt(self.head.config.head_dim)

    def keys_and_values(self, layer: EagleLayer, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[n, heads, d]`` of what the attention reads."""
        config, attention = self.head.config, layer.self_attn
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = (
            projection(x).unflatten(-1, (config.num_key_value_heads, -1))
            for projection in (attention.k_proj, attention.v_proj)
        )
        return rotate(k, rope).to(k.dtype).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    def out(self, layer: EagleLayer, mixed: Tensor) -> Tensor:
        """Return the output of an attention from the mixed values ``[n, heads, d]``."""
        output: Tensor = layer.self_attn.o_proj(mixed.flatten(-2))
        return output


def attended(
    batch: Batch,
    queries: Tensor,
    at: Tensor,
    counts: list[int],
    context: tuple[Tensor, Tensor],
    own: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Return the mixed values of rows, ``[n, heads, d]``. A row attends to the text up to its own place, and to its own
    keys of other steps.

    Args:
        queries: of the rows, which are those of the first text, then of the second, ….
        at: the places of the rows in the batch, ``[n]``.
        counts: number of rows of each text.
        context: keys and values of all places, ``[N, heads, d]``.
        own: keys and values of the rows, ``[n, heads, d]`` each.
    """
    beside = [(queries * keys).sum(-1, keepdim=True) for keys, _ in own]
    scores_beside = torch.cat(beside, -1) if beside else queries[..., :0]
    mixed, weights_beside = [], []
    # Split, not sliced: the gradient of a slice is as large as the whole.
    texts = zip(*(part.split(list(batch.lengths)) for part in context), strict=True)
    rows = zip(queries.split(counts), scores_beside.split(counts), at.split(counts), strict=True)
    for (q, extra, places), (keys, values), length in zip(rows, texts, batch.lengths, strict=True):
        k, v = keys.transpose(0, 1), values.transpose(0, 1)
        future = torch.arange(length, device=at.device) > batch.position[places][:, None]
        scores = (q.transpose(0, 1) @ k.transpose(-1, -2)).float().masked_fill(future, float("-inf"))
        weights = torch.cat([scores, extra.transpose(0, 1).float()], -1).softmax(-1).to(v.dtype)
        mixed.append((weights[..., :length] @ v).transpose(0, 1))
        weights_beside.append(weights[..., length:].transpose(0, 1))
    total = torch.cat(mixed)
    if own:
        for weights, (_, values) in zip(torch.cat(weights_beside).split(1, -1), own, strict=True):
            total = total + weights * values
    return total
