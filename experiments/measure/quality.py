"""What a dtype costs in quality: perplexity, and agreement with float32, on the same texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from spec_envs.decoding.weights.checkpoints import load_target


@torch.inference_mode()
def quality(target: str, device: torch.device, dtypes: Sequence[str], texts: Sequence[list[int]]) -> dict[str, dict]:
    """For each dtype: ``perplexity`` of the texts, ``agreement`` of the most probable token with float32's, and
    ``kl``, the mean Kullback–Leibler divergence of its distribution from float32's, in nats."""
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
        name: {"perplexity": math.exp(loss / predicted), "agreement": same / rows, "kl": kl / rows}
        for name, (loss, same, kl) in sums.items()
    }
