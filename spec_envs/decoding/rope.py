"""Rotary positions (RoFormer, arXiv 2104.09864), in the half-split layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

STATIC_ROPE = ("linear", "llama3", "yarn")  # the others depend on the sequence length


class Rope:
    """Rotary position tables (cosine, and sine with the sign of the half it multiplies), computed in float32."""

    def __init__(self, config: PretrainedConfig, head_dim: int, length: int, dtype: torch.dtype, device: torch.device):
        parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if kind == "default":
            theta: float = parameters.get("rope_theta") or 10_000.0
            frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
            scale = 1.0
        elif kind in STATIC_ROPE:
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        else:
            raise ValueError(f"rope type {kind!r} is not supported; expected default, {', '.join(STATIC_ROPE)}")
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies.float())
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos = torch.cat([cos, cos], -1).to(device, dtype)
        self.sin = torch.cat([-sin, sin], -1).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables ``[..., head_dim]`` for integer ``positions`` ``[...]``."""
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply tables ``[..., head_dim]`` to ``[..., heads, head_dim]``."""
    cos, sin = rope
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(x * cos.unsqueeze(-2), swapped, sin.unsqueeze(-2))
