"""The quality that a dtype costs: perplexity, and agreement with float32, on the same texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spec_envs.decoding.weights.checkpoints import load_target


@dataclass(frozen=True)
class Quality:
    """A dtype's quality on texts.

    Attributes:
        perplexity: of the texts.
        agreement: share of positions at which the most probable token is float32's.
        kl: mean Kullback–Leibler divergence of the distribution from float32's, in nats.
    """

    perplexity: float
    agreement: float
    kl: float


@torch.inference_mode()
def quality(target: str, device: torch.device, dtypes: Sequence[str], texts: Sequence[list[int]]) -> dict[str, Quality]:
    """Return the quality of each dtype, float32 among them, on texts of token ids."""
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
