"""Training of an EAGLE-3 head by training-time test (arXiv 2503.01840, section 3): the head is unrolled over its own
outputs, so that deep levels see in training what they see in use."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from experiments.recording import Example, load_shard
from spec_envs.decoding.drafters.eagle_head import EagleHead
from spec_envs.decoding.transformer import Rope, rotate

STEP_DECAY = 0.8  # weight of one unrolled step relative to the one before


@dataclass
class Batch:
    """Conversations padded on the right.

    ids ``[B, T]``, features ``[B, T, 3·hidden]``, final ``[B, T, hidden]``, lengths and answers ``[B]``.
    """

    ids: Tensor
    features: Tensor
    final: Tensor
    lengths: Tensor
    answers: Tensor

    @classmethod
    def of(cls, examples: list[Example], device: torch.device) -> Batch:
        columns = [
            pad_sequence([getattr(e, name) for e in examples], batch_first=True).to(device)
            for name in ("ids", "features", "final")
        ]
        lengths = torch.tensor([len(e.ids) for e in examples], device=device)
        return cls(*columns, lengths, torch.tensor([e.answer for e in examples], device=device))


class Unrolled(nn.Module):
    """The head, unrolled: row t starts from the target's hidden state at position t; at step i it has been fed the
    text's tokens t+1 … t+1+i and predicts token t+2+i, reading its own output of step i−1."""

    def __init__(self, head: EagleHead, embedding: Tensor):
        super().__init__()
        self.head = head
        self.embedding = embedding
        self.rope = Rope(head.config, head.config.head_dim, torch.float32, embedding.device)

    def forward(self, batch: Batch, steps: int) -> Iterator[Tensor]:
        """Yield the logits ``[B, T, draft_vocab]`` of each step."""
        config, layer, attention = self.head.config, self.head.midlayer, self.head.midlayer.self_attn
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, batch.ids.shape[1]
        hidden = self.head.fc(batch.features)
        causal = torch.full((width, width), float("-inf"), device=hidden.device).triu(1)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step in range(steps):
            tokens = F.pad(batch.ids[:, step + 1 :], (0, step + 1))
            embedded = F.embedding(tokens, self.embedding).to(hidden.dtype)
            x = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], -1)
            rope = self.rope.at(torch.arange(width, device=hidden.device) + step)
            q = rotate(attention.q_proj(x).unflatten(-1, (heads, -1)), rope).transpose(1, 2)
            k = rotate(attention.k_proj(x).unflatten(-1, (kv_heads, -1)), rope).transpose(1, 2)
            v = attention.v_proj(x).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
            keys.append(k.repeat_interleave(heads // kv_heads, 1))
            values.append(v.repeat_interleave(heads // kv_heads, 1))
            q = q / math.sqrt(config.head_dim)
            # Step 0's keys are the known past; of each later step a row sees its own key only.
            scores = [q @ keys[0].transpose(-1, -2) + causal]
            scores += [(q * key).sum(-1, keepdim=True) for key in keys[1:]]
            weights = torch.cat([s.float() for s in scores], -1).softmax(-1).to(q.dtype)
            mixed = weights[..., :width] @ values[0]
            for i, value in enumerate(values[1:]):
                mixed = mixed + weights[..., width + i, None] * value
            hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(-2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            yield self.head.lm_head(self.head.norm(hidden))


def drafted_rows(batch: Batch, step: int) -> Tensor:
    """Rows ``[B, T]`` (bool) at which a chain of this length is drafted inside the answer."""
    row = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    return (row >= batch.answers[:, None] - 1) & (row + 2 + step < batch.lengths[:, None])


class Objective:
    """Cross-entropy to the target's distribution over the draft vocabulary.

    Positions at which the target's own choice cannot be drafted carry no loss, as published.
    """

    def __init__(self, model: Unrolled, output_head: Tensor, dtype: torch.dtype):
        """``output_head``: the target's output rows ``[vocab, hidden]``."""
        self.model, self.dtype = model, dtype
        self.t2d = model.head.t2d
        self.draft_ids = model.head.draft_ids
        self.draft_rows = output_head[self.draft_ids].to(dtype)

    def __call__(self, batch: Batch, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (a scalar), and per step the number of rows whose whole chain so far is accepted, and of all rows."""
        with torch.no_grad():
            wanted = (batch.final.to(self.dtype) @ self.draft_rows.T).float().softmax(-1)  # [B, T, draft_vocab]
        device = batch.ids.device
        loss = torch.zeros((), device=device)
        survived, rows = torch.zeros(steps, device=device), torch.zeros(steps, device=device)
        alive = torch.ones_like(batch.ids, dtype=torch.bool)
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            for step, logits in enumerate(self.model(batch, steps)):
                inside = drafted_rows(batch, step)
                shifted = F.pad(batch.ids[:, step + 2 :], (0, step + 2))
                drafted = inside & self.t2d[shifted]
                picked = drafted.nonzero(as_tuple=True)
                logits = logits[picked].float()
                target = wanted[picked[0], picked[1] + 1 + step]
                loss = loss - STEP_DECAY**step * (target * logits.log_softmax(-1)).sum() / inside.sum().clamp(min=1)
                right = torch.zeros_like(alive)
                right[picked] = self.draft_ids[logits.argmax(-1)] == shifted[picked]
                alive = alive & right
                survived[step], rows[step] = alive.sum(), inside.sum()
        return loss, survived, rows


def batches(paths: list[Path], tokens: int, rng: random.Random) -> Iterator[list[Example]]:
    """Examples of similar length, about ``tokens`` tokens at a time, in random order within shuffled files."""
    for path in rng.sample(paths, len(paths)):
        groups: list[list[Example]] = [[]]
        for example in load_shard(path):  # shortest first
            if groups[-1] and (len(groups[-1]) + 1) * len(example.ids) > tokens:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        yield from groups


def learning_rate(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    objective: Objective,
    paths: list[Path],
    checkpoint: Path,
    epochs: int,
    steps: int,
    batch_tokens: int,
    peak: float,
    seed: int,
) -> None:
    """Train the head in place; an interrupted run continues from ``checkpoint`` at the epoch's next batch."""
    model, device = objective.model, objective.draft_rows.device
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    per_epoch = sum(1 for _ in batches(paths, batch_tokens, random.Random(0)))
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    total = epochs * per_epoch
    with tqdm(total=total, initial=done, unit="batch", desc="training the head") as bar:
        for epoch in range(epochs):
            for i, examples in enumerate(batches(paths, batch_tokens, random.Random(f"{seed}-{epoch}"))):
                if epoch * per_epoch + i < done:
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(done, total, peak)
                loss, survived, rows = objective(Batch.of(examples, device), steps)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.head.parameters(), 0.5)
                optimizer.step()
                done += 1
                bar.update()
                if done % 10 == 0:
                    chain = (survived / rows.clamp(min=1)).tolist()
                    bar.set_postfix(loss=f"{loss.item():.3f}", accepted=" ".join(f"{a:.2f}" for a in chain))
                if done % 200 == 0 or done == total:
                    temporary = checkpoint.with_suffix(".tmp")
                    state = {"head": model.head.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
                    torch.save(state, temporary)
                    temporary.replace(checkpoint)


@torch.no_grad()
def report(objective: Objective, paths: list[Path], batch_tokens: int, depth: int) -> dict:
    """Cumulative chain acceptance by depth 1…``depth`` on held-out text."""
    survived, rows = torch.zeros(depth), torch.zeros(depth)
    for examples in batches(paths, batch_tokens, random.Random(0)):
        _, s, r = objective(Batch.of(examples, objective.draft_rows.device), depth)
        survived += s.cpu()
        rows += r.cpu()
    return {
        "positions": int(rows[0]),
        "chain_acceptance": [round(a, 4) for a in (survived / rows.clamp(min=1)).tolist()],
    }
