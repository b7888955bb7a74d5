"""The tensors that a model of a given config has: those of transformers' model of the same config."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor
from transformers import PretrainedConfig

from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.weights.blocks import Blocks, dense

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
HARMLESS = re.compile(r"(model\.(layers\.\d+\.self_attn\.)?)?rotary_emb\.inv_freq")  # written by older transformers


def fitting(
    config: PretrainedConfig,
    shape: Shape,
    weights: Mapping[str, Tensor | Blocks],
    outputs: int,
    without: Collection[str] = (),
) -> dict[str, Tensor | Blocks]:
    """Return the tensors of a model of this config; others are left out, which transformers ignores, too.

    Args:
        config, shape: of the model.
        weights: its state dict; blocks of a GGUF file stand for their numbers.
        outputs: number of output rows.
        without: names of tensors that another model has.

    Returns:
        The tensors by name; ``EMBEDDING`` and ``OUTPUT`` are the same tensor where the two are tied.

    Raises:
        ValueError: a tensor is missing, has another size, or does not hold floating-point numbers.
    """
    found = dict(weights)
    if config.tie_word_embeddings:  # as in transformers, either stands for both, and two that differ are not tied
        embedding, output = found.get(EMBEDDING), found.get(OUTPUT)
        if embedding is None and output is not None:
            found[EMBEDDING] = output
        elif embedding is not None and (output is None or same(embedding, output)):
            found[OUTPUT] = embedding
    expected = {name: size for name, size in tensors(config, shape, outputs) if name not in without}
    for name, size in expected.items():
        if name not in found:
            raise ValueError(f"the weights do not fit their config.json: {name} is missing")
        tensor = found[name]
        if tuple(tensor.shape) != size:
            raise ValueError(
                f"the weights do not fit their config.json: {name} is {list(tensor.shape)}, not {list(size)}"
            )
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            raise ValueError(f"{name} is stored as {tensor.dtype}; expected weights in floating-point numbers")
    return {name: found[name] for name in expected}


def same(a: Tensor | Blocks, b: Tensor | Blocks) -> bool:
    """Return whether two tensors hold the same numbers."""
    return a.shape == b.shape and bool((dense(a) == dense(b)).all())


def tensors(config: PretrainedConfig, shape: Shape, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and size of every tensor of a model with ``outputs`` output rows."""
    hidden, inner = shape.hidden, config.intermediate_size
    attended, kept = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield EMBEDDING, (shape.vocab, hidden)
    yield OUTPUT, (outputs, hidden)
    yield "model.norm.weight", (hidden,)
    qkv, out, feed = biases(config)
    products = {
        "self_attn.q_proj": (attended, hidden, qkv),
        "self_attn.k_proj": (kept, hidden, qkv),
        "self_attn.v_proj": (kept, hidden, qkv),
        "self_attn.o_proj": (hidden, attended, out),
        "mlp.gate_proj": (inner, hidden, feed),
        "mlp.up_proj": (inner, hidden, feed),
        "mlp.down_proj": (hidden, inner, feed),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.model_type == "qwen3":
        norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
    for layer in range(shape.layers):
        for name, (rows, columns, biased) in products.items():
            yield f"model.layers.{layer}.{name}.weight", (rows, columns)
            if biased:
                yield f"model.layers.{layer}.{name}.bias", (rows,)
        for name, width in norms.items():
            yield f"model.layers.{layer}.{name}.weight", (width,)


def biases(config: PretrainedConfig) -> tuple[bool, bool, bool]:
    """Return whether queries, keys and values, the attention's output, and the feed-forward part have biases."""
    if config.model_type == "llama":
        return config.attention_bias, config.attention_bias, config.mlp_bias
    if config.model_type == "qwen3":
        return config.attention_bias, config.attention_bias, False
    return config.model_type == "qwen2", False, False


def refuse_unread(config: PretrainedConfig, names: Iterable[str]) -> None:
    """Raise ValueError for tensors that a model of this config would not read, since it is then another model."""
    shape = Shape.from_config(config)
    read = dict(tensors(config, shape, shape.vocab))
    unread = sorted(name for name in names if name not in read and not HARMLESS.fullmatch(name))
    if unread:
        shown = ", ".join(unread[:3]) + (f" and {len(unread) - 3} others" if len(unread) > 3 else "")
        raise ValueError(
            f"the weights hold tensors that a {config.model_type!r} with this config.json does not read: {shown}; it "
            "may be quantised, of another architecture, or have an adapter that was not merged"
        )
