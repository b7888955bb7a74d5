"""Logits of a whole text in one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spec_envs.decoding.model.transformer import Transformer


def text_logits(model: Transformer, ids: Tensor, **keywords: Any) -> Tensor:
    """Return logits ``[1, n, vocab]`` of ids ``[1, n]``; keywords are those of ``Transformer.forward``."""
    n = ids.shape[1]
    hidden, _ = model.forward(model.embed(ids), model.cache(n), torch.arange(n)[None], **keywords)
    return model.head(hidden)
