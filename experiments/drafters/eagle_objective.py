"""The objective of training an EAGLE-3 head: training-time test (arXiv 2503.01840, section 3). The head is unrolled
over its own outputs, so that deep levels read in training what they read in use."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.model.rope import Rope, rotate
from spec_envs.experiments.drafters.batches import Batch, drafted_rows, first_occurrence

STEP_DECAY = 0.8  # weight of an unrolled step relative to the step before


def sample_rows(batch: Batch, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Return random rows of the answers, ``[B, n]``: the same number for every conversation, in ascending order."""
    inside = drafted_rows(batch, 0)
    count = max(1, round(share * int(inside.sum(1).max())))
    keys = torch.rand(inside.shape, device=inside.device, generator=generator).masked_fill_(~inside, 2.0)
    return keys.topk(count, dim=1, largest=False).indices.sort(1).values


class Unrolled(nn.Module):
    """A head that is unrolled over its own outputs.

    Row t starts from the target's hidden state at position t. At step i it has read tokens t+1 … t+1+i of the text and
    its own output of step i−1, and predicts token t+2+i. After step 0 a row attends to the keys of step 0 up to its own
    and to its own later keys, but to no later keys of other rows. So deeper steps can be computed for a random share of
    the rows, which is a much cheaper sample and nearly as good.
    """

    def __init__(self, head: EagleHead, embedding: Tensor, positions: int):
        """``positions``: tokens of the longest text plus the levels that are unrolled after it."""
        super().__init__()
        self.head = head
        self.embedding = embedding
        self.rope = Rope(head.config, head.config.head_dim, positions, torch.float32, embedding.device)

    def forward(self, batch: Batch, steps: int, rows: Tensor) -> Iterator[Tensor]:
        """Yield the normed output of each step: ``[B, T, hidden]`` at step 0, then ``[B, n, hidden]`` for ``rows``."""
        width = batch.ids.shape[1]
        all_rows = torch.arange(width, device=batch.ids.device).expand(len(batch.ids), -1)
        hidden, keys, values = self.head.fc(batch.features), [], []
        for step in range(steps):
            if step == 1:
                hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
            at = rows if step else all_rows
            q, k, v = self._project(batch, hidden, at, step)
            keys.append(k)
            values.append(v)
            hidden = hidden + self._attend(q, keys, values, at)
            layer = self.head.midlayer
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            yield self.head.norm(hidden)

    def _project(self, batch: Batch, hidden: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values ``[B, heads, n, d]`` of rows, each of which reads token ``row + 1 + step`` of
        its text."""
        config, layer, attention = self.head.config, self.head.midlayer, self.head.midlayer.self_attn
        tokens = batch.ids.gather(1, (rows + 1 + step).clamp(max=batch.ids.shape[1] - 1))
        embedded = F.embedding(tokens, self.embedding).to(hidden.dtype)
        x = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], -1)
        rope = self.rope.at(rows + step)
        q = rotate(attention.q_proj(x).unflatten(-1, (config.num_attention_heads, -1)), rope).transpose(1, 2)
        k = rotate(attention.k_proj(x).unflatten(-1, (config.num_key_value_heads, -1)), rope).transpose(1, 2)
        v = attention.v_proj(x).unflatten(-1, (config.num_key_value_heads, -1)).transpose(1, 2)
        groups = config.num_attention_heads // config.num_key_value_heads
        return q / math.sqrt(config.head_dim), k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    def _attend(self, q: Tensor, keys: list[Tensor], values: list[Tensor], rows: Tensor) -> Tensor:
        """Return the attention of each row to the keys of step 0 up to its own, and to its own keys of later steps."""
        width = keys[0].shape[2]
        future = torch.arange(width, device=rows.device) > rows[:, None, :, None]
        scores = [(q @ keys[0].transpose(-1, -2)).float().masked_fill(future, float("-inf"))]
        scores += [(q * key).sum(-1, keepdim=True).float() for key in keys[1:]]
        weights = torch.cat(scores, -1).softmax(-1).to(values[0].dtype)
        mixed = weights[..., :width] @ values[0]
        for i, value in enumerate(values[1:]):
            mixed = mixed + weights[..., width + i, None] * value
        out: Tensor = self.head.midlayer.self_attn.o_proj(mixed.transpose(1, 2).flatten(-2))
        return out


class Objective:
    """Cross-entropy to the target's distribution over the draft vocabulary: over whole texts at the first step, and
    over the answers at later steps.

    In training the draft vocabulary is the shortlist and every token of the batch. The output rows are the target's and
    stay fixed, so a head that learns to predict a token does not need it in the shortlist.

    Args:
        output_head: the target's output rows ``[vocab, hidden]``.
        dtype: dtype of autocast.
    """

    def __init__(self, model: Unrolled, output_head: Tensor, dtype: torch.dtype):
        self.model, self.trained, self.dtype = model, model.head, dtype
        self.shortlist = model.head.t2d
        self.output_head = output_head.to(dtype)

    def __call__(
        self, batch: Batch, steps: int, share: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss (a scalar) and, for each step, the number of rows whose whole chain so far is accepted, and
        the number of all rows: ``[steps]`` each.

        Args:
            share: share of the rows for which steps after the first are computed.
            generator: draws those rows.
        """
        device = batch.ids.device
        rows = sample_rows(batch, share, generator)
        loss = torch.zeros((), device=device)
        alive = torch.zeros(0, dtype=torch.bool, device=device)  # rows whose chain so far is right
        survived, counted = torch.zeros(steps, device=device), torch.zeros(steps, device=device)
        vocabulary = self.shortlist.clone()
        vocabulary[batch.ids] = True
        vocabulary = vocabulary.nonzero()[:, 0]
        output_rows = self.output_head[vocabulary]
        first = first_occurrence(batch.ids)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            for step, hidden in enumerate(self.model(batch, steps, rows)):
                inside = drafted_rows(batch, step)
                if step:
                    inside = inside.gather(1, rows)
                trained = inside if step else drafted_rows(batch, 0, within_answer=False)
                picked = trained.nonzero(as_tuple=True)
                at = rows[picked] if step else picked[1]
                ahead = (picked[0], at + 1 + step)  # last token that is read before the prediction
                wanted = F.linear(batch.final[ahead].to(self.dtype), output_rows).float().softmax(-1)
                logits = F.linear(hidden[picked], output_rows).float()
                loss = loss + STEP_DECAY**step * F.cross_entropy(logits, wanted, reduction="sum") / max(1, len(at))
                following = batch.ids[picked[0], at + 2 + step]
                right = torch.zeros_like(inside)
                right[picked] = (vocabulary[logits.argmax(-1)] == following) & (
                    self.shortlist[following] | (first[picked[0], at + 2 + step] <= at + 1)
                )
                alive = right & inside if step == 0 else alive & right
                survived[step], counted[step] = alive.sum(), inside.sum()
                if step == 0:
                    alive = alive.gather(1, rows)
        return loss, survived, counted
