"""Sampling distributions: temperature, then nucleus."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def probabilities(logits: Tensor, temperature: float, top_p: float = 1.0) -> np.ndarray:
    """The distribution ``[vocab]`` (float64) that tokens are drawn from: the smallest set of mass ``top_p`` of the
    softmax of ``logits / temperature``."""
    p = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = p.sort(descending=True, stable=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p
        p[index[dropped]] = 0.0
        p /= p.sum()
    return p.cpu().numpy()
