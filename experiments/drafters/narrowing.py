"""Narrower layers, for drafters whose steps cost less."""

from __future__ import annotations

import torch
from torch import Tensor

GATE = "mlp.gate_proj.weight"


def narrowed(weights: dict[str, Tensor], units: int) -> dict[str, Tensor]:
    """Return a state dict whose feed-forward parts have ``units`` units: those with the largest product of the norms of
    their weights.

    Args:
        weights: the state dict of a model with SwiGLU layers.

    Raises:
        ValueError: the layers do not have more units than that.
    """
    result = dict(weights)
    for layer in (name.removesuffix(GATE) for name in weights if name.endswith(GATE)):
        gate, up, down = (weights[f"{layer}mlp.{part}_proj.weight"].float() for part in ("gate", "up", "down"))
        if not units < len(gate):
            raise ValueError(
                f"--intermediate is {units}; expected fewer than the {len(gate)} units of the target's layers"
            )
        read = weights[f"{layer}post_attention_layernorm.weight"].float()
        sizes = (gate * read).norm(dim=1) * (up * read).norm(dim=1) * down.norm(dim=0)
        kept = sizes.topk(units).indices.sort().values
        for part in ("gate", "up"):
            for name in (f"{layer}mlp.{part}_proj.weight", f"{layer}mlp.{part}_proj.bias"):
                if name in weights:
                    result[name] = weights[name][kept]
        result[f"{layer}mlp.down_proj.weight"] = weights[f"{layer}mlp.down_proj.weight"][:, kept]
    return result


def multiplied(module: torch.nn.Module) -> int:
    """Return the number of weights in a module's matrices that are trained, without output rows."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad and p.dim() == 2)
