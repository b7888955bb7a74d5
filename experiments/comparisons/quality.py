"""The quality of each dtype: perplexity, and agreement with float32, on the same texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spec_envs.decoding.weights.checkpoints import load_target


@dataclass(frozen=True)
class Quality:
    """The quality of a dtype on texts.

    Attributes:
        perplexity: perplexity of the texts.
        agreement: share of positions at which the most probable token is the same as in float32.
        kl: mean Kullback–Leibler divergence KL(float32 ‖ dtype), in nats per token.
    """

    perplexity: float
    agreement: float
    kl: float


@torch.inference_mode()
def quality(target: str, device: torch.device, dtypes: Sequence[str], texts: Sequence[list[int]]) -> dict[str, Quality]:
    """Return the quality of each dtype, and of float32, on texts of token ids."""
    names = ["float32", *(name for name in dtypes if name != "float32")]
    models = {name: load_target(target, device, getattr(torch, name)) for name in names}
    sums = {name: [0.0, 0.0, 0.0] for name in names}  # negative log-likelihood, agreement, divergence
    predicted, rows = 0, 0
    for text in texts:
        ids = torch.tensor([text], device=device)
        positions = torch.arange(len(text), device=device)[None]
        reference = torch.empty(0)
        for name, model in models.items():
            hidden, _ = model.forward(model.embed(ids), model.cache(len(text)), positions)
            log_p = model.head(hidden)[0].float().log_softmax(-1)
            reference = log_p if name == "float32" else reference
            sums[name][0] -= float(log_p[:-1].gather(1, ids[0, 1:, None]).sum())
            sums[name][1] += float((log_p.argmax(-1) == reference.argmax(-1)).sum())
            sums[name][2] += float((reference.exp() * (reference - log_p)).sum())
        predicted, rows = predicted + len(text) - 1, rows + len(text)
    return {
        name: Quality(math.exp(loss / predicted), same / rows, kl / rows) for name, (loss, same, kl) in sums.items()
    }
