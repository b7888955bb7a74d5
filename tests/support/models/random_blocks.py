"""Random weights as stored blocks."""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from spec_envs.decoding.weights.blocks import Blocks

Kind = GGMLQuantizationType
HALVES = {Kind.Q4_0: [0], Kind.Q4_1: [0, 2], Kind.Q5_0: [0], Kind.Q8_0: [0], Kind.Q4_K: [0, 2], Kind.Q6_K: [208]}


def random_blocks(kind: GGMLQuantizationType, outputs: int, inputs: int, seed: int = 0, size: float = 0.1) -> Blocks:
    """Return a weight ``[outputs, inputs]`` of random bytes whose scales in float16 are at most ``size``."""
    rng = np.random.default_rng(seed)
    per_block, length = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (outputs, inputs // per_block, length), dtype=np.uint8)
    for at in HALVES[kind]:
        data[..., at : at + 2] = rng.uniform(-size, size, (*data.shape[:2], 1)).astype(np.float16).view(np.uint8)
    return Blocks(kind, torch.from_numpy(data.reshape(outputs, -1)))
