"""Tiny models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from spec_envs.decoding.weights.blocks import Blocks
from spec_envs.decoding.weights.gguf_weights import NAMES, OUTSIDE, QK_NORMS, interleaved

SPECIAL = ["<|close|>", "<|turn|>", "<|pad|>"]
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "tie_word_embeddings": True,
}


def byte_tokens() -> list[str]:
    """Return the characters that stand for bytes in byte-level vocabularies, one merge of them, and special tokens."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [chr(256 + i) for i in range(256 - len(shown))]
    return [*map(chr, shown), *hidden, "th", *SPECIAL]


TOKENS = byte_tokens()
END, TURN, PAD = (len(TOKENS) - 3 + i for i in range(3))
CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tiny_model(family: str = "llama", seed: int = 1, **settings: Any) -> Any:
    """Return a random model of a family over the tokens of ``TOKENS``."""
    torch.manual_seed(seed)
    width = {} if family == "qwen2" else {"head_dim": 8}
    ids = {"vocab_size": len(TOKENS), "eos_token_id": END, "pad_token_id": PAD}
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**(SIZE | width | ids | settings))).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def fields_of(model: Any) -> dict[str, Any]:
    """Return the metadata of a model's file."""
    c, family = model.config, model.config.model_type
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return {
        f"{family}.block_count": c.num_hidden_layers,
        f"{family}.context_length": c.max_position_embeddings,
        f"{family}.embedding_length": c.hidden_size,
        f"{family}.feed_forward_length": c.intermediate_size,
        f"{family}.attention.head_count": c.num_attention_heads,
        f"{family}.attention.head_count_kv": c.num_key_value_heads,
        f"{family}.attention.key_length": head_dim,
        f"{family}.attention.value_length": head_dim,
        f"{family}.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        f"{family}.rope.dimension_count": head_dim,
        f"{family}.rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 3) + [3] * 3,
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.ggml.padding_token_id": PAD,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """Return the tensors of a model's file."""
    there = {here: name for name, here in (NAMES | QK_NORMS).items()}
    outside = {here: name for name, here in OUTSIDE.items()}
    c, found = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if name in outside:
            found[outside[name]] = tensor.numpy()
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        module, _, kind = rest.rpartition(".")
        if c.model_type == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = interleaved(tensor, c.head_dim)
        found[f"blk.{layer}.{there[module]}.{kind}"] = tensor.contiguous().numpy()
    return found


def value_kind(value: Any) -> GGUFValueType:
    """Return the GGUF type that a value is written as."""
    kinds = {bool: "BOOL", int: "INT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return GGUFValueType[kinds[type(value)]]


def write_fields(
    path: Path, family: str, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray | Blocks]
) -> Path:
    """Write a GGUF file of these fields and tensors, and return its path."""
    writer = GGUFWriter(str(path), family)
    for key, value in fields.items():
        writer.add_key_value(key, value, value_kind(value), value_kind(value[0]) if isinstance(value, list) else None)
    for name, array in tensors.items():
        if isinstance(array, Blocks):
            writer.add_tensor(name, array.data.numpy(), raw_dtype=array.kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_gguf(
    model: Any,
    path: Path,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | Blocks] | None = None,
    without: Sequence[str] = (),
) -> Path:
    """Write a model as a GGUF file and return its path.

    ``fields`` and ``tensors`` are added or replaced, names in ``without`` are left out; the architecture's name is
    prepended to fields that begin with a point.
    """
    family = model.config.model_type
    changed = {f"{family}{key}" if key.startswith(".") else key: value for key, value in (fields or {}).items()}
    kept = {key: value for key, value in (fields_of(model) | changed).items() if key not in without}
    arrays = {key: array for key, array in (tensors_of(model) | dict(tensors or {})).items() if key not in without}
    return write_fields(path, family, kept, arrays)


def in_blocks(model: Any, kinds: Sequence[GGMLQuantizationType]) -> dict[str, Blocks]:
    """Return the matrices of a model's file in blocks of these kinds, in turn."""
    matrices = ((name, array) for name, array in tensors_of(model).items() if array.ndim == 2)
    return {name: quantised(array, kind) for (name, array), kind in zip(matrices, itertools.cycle(kinds), strict=False)}


def quantised(array: np.ndarray, kind: GGMLQuantizationType) -> Blocks:
    """Return a matrix in blocks. Where the library does not quantise to a kind, the blocks hold other numbers of about
    the same size, the same ones for the same matrix."""
    per_block, size = GGML_QUANT_SIZES[kind]
    try:
        return Blocks(kind, torch.from_numpy(quants.quantize(array, kind)))
    except NotImplementedError:
        random = np.random.default_rng(abs(int(array[0, 0] * 2**20)))
    data = random.integers(0, 256, (len(array), array.shape[1] // per_block, size), np.uint8)
    scale = np.float16(array.std() / {"Q4_K": 200, "Q6_K": 1000}[kind.name])
    begin = 0 if kind.name == "Q4_K" else size - 2  # of the block's scale; Q4_K has one of its offsets as well
    data[..., begin : begin + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    if kind.name == "Q4_K":
        data[..., 2:4] = np.frombuffer(np.float16(scale * 7).tobytes(), np.uint8)
    return Blocks(kind, torch.from_numpy(data.reshape(len(array), -1)))


def split(model: Any, folder: Path, count: int = 2) -> list[Path]:
    """Write a model in ``count`` GGUF files and return their paths."""
    fields, arrays = fields_of(model), tensors_of(model)
    names, paths = list(arrays), []
    for i in range(count):
        path = folder / f"model-{i + 1:05}-of-{count:05}.gguf"
        about = {"split.no": i, "split.count": count, "split.tensors.count": len(names)}
        part = {name: arrays[name] for name in names[i::count]}
        paths.append(write_fields(path, model.config.model_type, (fields if i == 0 else {}) | about, part))
    return paths


def reference(model: Any, ids: Sequence[int], count: int = 24, **settings: Any) -> list[int]:
    """Return the greedy text of transformers."""
    prompt = torch.tensor([list(ids)])
    with torch.no_grad():
        out = model.generate(prompt, max_new_tokens=count, do_sample=False, pad_token_id=PAD, **settings)
    return out[0, len(ids) :].tolist()
