"""Int8 models computed with torch's operators, as references for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from spec_envs.decoding.model import layers, linear
from spec_envs.decoding.model.kernels import packing
from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.tensors import OUTPUT, tensors

CPU = torch.device("cpu")


def unpacked(tiles: Tensor, scale: Tensor) -> Tensor:
    """Return the weight ``[out, in]``, both rounded up to whole blocks: the inverse of
    ``packed`` up to rounding."""
    w = tiles.permute(0, 2, 4, 1, 3, 5).reshape(len(scale), -1, 64).float() * scale[:, None, None]
    return (w @ packing.hadamard(64)).flatten(1)


class Quantised(linear.Linear):
    """The reference of an int8 matrix product."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.inputs = weight.shape[1]
        super().__init__(unpacked(*packing.packed(weight))[: len(weight), : self.inputs], bias)

    def __call__(self, x: Tensor) -> Tensor:
        turned = torch.nn.functional.pad(x, (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64)) @ packing.hadamard(64)
        scale = turned.abs().amax((-1, -2), keepdim=True).clamp(min=1e-30) / 127
        rows = ((turned / scale).round() * scale @ packing.hadamard(64)).flatten(-2)
        return super().__call__(rows[..., : self.inputs])


def reference(config: PretrainedConfig, weights: dict[str, Tensor]) -> Transformer:
    """Return the model in torch's operators; only matrix products and their inputs are quantised, the rest is
    float32."""
    plain, layers.Linear = layers.Linear, Quantised  # type: ignore[misc]
    try:
        return Transformer(config, weights, torch.float32, CPU)
    finally:
        layers.Linear = plain  # type: ignore[misc]


def random_weights(config: PretrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random weights for this config that keep hidden states at about their size.

    Raises:
        ValueError: if no dtype computes the config.
    """
    shape, weights = Shape.from_config(config), {}
    for name, size in tensors(config, shape, shape.vocab):
        numbers = torch.randn(size, generator=generator)
        if name.endswith("bias"):
            numbers *= 0.3
        elif len(size) == 1:  # gain of a norm
            numbers = 1 + 0.3 * numbers
        elif "layers" in name:
            numbers /= size[1] ** 0.5
        weights[name] = numbers
    if config.tie_word_embeddings:
        del weights[OUTPUT]
    return weights


def eagle_layer(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Return weights of a layer whose attention reads twice the hidden size, as in an EAGLE-3 head."""
    hidden, attended, kept = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "self_attn.q_proj": (attended, 2 * hidden),
        "self_attn.k_proj": (kept, 2 * hidden),
        "self_attn.v_proj": (kept, 2 * hidden),
        "self_attn.o_proj": (hidden, attended),
        "mlp.gate_proj": (48, hidden),
        "mlp.up_proj": (48, hidden),
        "mlp.down_proj": (hidden, 48),
    }
    weights = {
        f"{name}.weight": torch.randn(size, generator=generator) / size[1] ** 0.5 for name, size in sizes.items()
    }
    norms = ("input_layernorm", "post_attention_layernorm", "hidden_norm")
    return weights | {f"{name}.weight": torch.rand(hidden, generator=generator) + 0.5 for name in norms}


def reference_layers(weights: list[dict[str, Tensor]], shape: Shape) -> layers.Layers:
    """Return layers in torch's operators; only matrix products and their inputs are quantised, the rest is float32."""
    plain, layers.Linear = layers.Linear, Quantised  # type: ignore[misc]
    try:
        return layers.Layers(weights, shape)
    finally:
        layers.Linear = plain  # type: ignore[misc]
