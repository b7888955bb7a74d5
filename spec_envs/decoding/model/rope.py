"""Rotary positions (RoFormer, arXiv 2104.09864), in the half-split layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Types whose frequencies do not depend on the length of the text. Those of "dynamic" do so only beyond the context, and
# those of "longrope" only beyond the original context and if its two lists of factors differ.
STATIC_ROPE = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")


class Rope:
    """Tables of rotary positions, computed in float32.

    Args:
        config: with the rope parameters.
        head_dim: size of a head.
        length: number of positions.
        dtype, device: of the tables.

    Attributes:
        cos, sin: ``[length, head_dim]``; the sine has the sign with which it multiplies its half.

    Raises:
        ValueError: the kind of rotary positions is not supported, or its parameters are wrong.
    """

    def __init__(self, config: PretrainedConfig, head_dim: int, length: int, dtype: torch.dtype, device: torch.device):
        turns, scale = frequencies(config, head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), turns)
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self.cos = torch.cat([cos, cos], -1).to(device, dtype)
        self.sin = torch.cat([-sin, sin], -1).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine ``[..., head_dim]`` at integer ``positions`` ``[...]``."""
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate heads ``[..., heads, head_dim]`` by tables ``[..., head_dim]``."""
    cos, sin = rope
    swapped = x.view(*x.shape[:-1], 2, -1).flip(-2).flatten(-2)
    return torch.addcmul(x * cos.unsqueeze(-2), swapped, sin.unsqueeze(-2))


def frequencies(config: PretrainedConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return the radians per position of each pair of a head's dimensions, ``[head_dim / 2]``, and the tables' scale.

    Raises:
        ValueError: the kind of rotary positions is not supported, or its parameters are wrong.
    """
    parameters: dict[str, Any] = config.rope_parameters or {}
    kind = parameters.get("rope_type")
    if kind not in STATIC_ROPE:
        raise ValueError(f"rope type {kind!r} is not supported; expected {', '.join(STATIC_ROPE)}")
    if kind != "proportional" and parameters.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"the rope parameters have partial_rotary_factor = {parameters['partial_rotary_factor']}; only whole heads "
            "are rotated here"
        )
    try:
        if kind == "default":
            turns, scale = 1.0 / parameters["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim), 1.0
        else:
            turns, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"the rope parameters {parameters} are not those of type {kind!r}: {type(error).__name__} {error}"
        ) from None
    if 2 * len(turns) != head_dim:
        raise ValueError(
            f"rope type {kind!r} rotates {2 * len(turns)} of the {head_dim} dimensions of a head; only all of them are "
            "supported"
        )
    if not (torch.isfinite(turns).all() and math.isfinite(scale)):
        raise ValueError(f"the rope parameters {parameters} give frequencies that are not finite numbers")
    return turns.float(), scale


def static_context(config: PretrainedConfig) -> int:
    """Return how many positions there are before the frequencies depend on the length of the text."""
    parameters: dict[str, Any] = config.rope_parameters or {}
    original, context = parameters.get("original_max_position_embeddings"), int(config.max_position_embeddings)
    if parameters.get("rope_type") != "longrope" or parameters.get("short_factor") == parameters.get("long_factor"):
        return context
    return min(context, original if type(original) is int else 0)
