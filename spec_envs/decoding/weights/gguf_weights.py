"""The weights in a GGUF file, by transformers' names and in its order of rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PretrainedConfig

from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.weights.blocks import Blocks, dequantised
from spec_envs.decoding.weights.gguf_file import GGUF, StoredTensor, part_files
from spec_envs.decoding.weights.tensors import fitting, refuse_unread
from spec_envs.files import write_bytes

LINK = "gguf.json"  # leads from the folder of a converted file to the file
NAMES = {  # of a layer's modules, in the file and in transformers
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"  # llama.cpp divides the frequencies by these; Llama 3.1 and later
FLOATS = {  # kinds that are read as they are stored
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class Part(NamedTuple):
    """A part of a GGUF file as it was when it was converted.

    Attributes:
        path: where it is.
        size: in bytes.
        changed: time of its last change, in nanoseconds.
    """

    path: str
    size: int
    changed: int


def parts_of(gguf: Path) -> list[Part]:
    """Return the parts of a GGUF file as they are now.

    Raises:
        ValueError: some are missing.
    """
    files = [(file.absolute(), file.stat()) for file in part_files(gguf)]  # their names tell them apart: links stay
    return [Part(str(file), status.st_size, status.st_mtime_ns) for file, status in files]


def link(gguf: Path, folder: Path) -> None:
    """Write to ``folder`` where the weights of its model are."""
    write_bytes(folder / LINK, msgspec.json.encode(parts_of(gguf)))


def linked(folder: Path) -> list[Path]:
    """Return the files to which a folder is linked; none if it is not the folder of a converted GGUF file.

    Raises:
        ValueError: a file is not there any more or was changed.
    """
    if not (folder / LINK).is_file():
        return []
    try:
        parts = msgspec.json.decode((folder / LINK).read_bytes(), type=list[Part])
    except msgspec.DecodeError as error:
        raise ValueError(f"cannot read {folder / LINK} ({error}); delete the folder") from None
    files = [Path(part.path) for part in parts]
    for file, part in zip(files, parts, strict=True):
        status = file.stat() if file.is_file() else None
        if status is None or (status.st_size, status.st_mtime_ns) != (part.size, part.changed):
            happened = "is not there any more" if status is None else "was changed since"
            raise ValueError(
                f"{folder} was made from {file}, which {happened}; name the GGUF file itself, to have it converted"
            )
    return files


def weights_of(gguf: GGUF, config: PretrainedConfig) -> dict[str, Tensor | Blocks]:
    """Return the weights of a file by transformers' names: matrices in blocks as ``Blocks``, others as tensors.

    Matrices are views of the mapped file, unless their rows are permuted.

    Raises:
        ValueError: tensors are missing, unknown, of another shape or of a type that cannot be read.
    """
    skipped = {ROPE_FACTORS} if gguf.metadata["general.architecture"] == "llama" else set()
    stored = {named_here(config, name): tensor for name, tensor in gguf.tensors.items() if name not in skipped}
    refuse_unread(config, stored)
    shape = Shape.from_config(config)
    shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in stored.items()}
    fitting(config, shape, shapes, shape.vocab)
    return {name: weight_of(name, tensor, config) for name, tensor in stored.items()}


def named_here(config: PretrainedConfig, name: str) -> str:
    """Return transformers' name of a tensor, or ``name`` itself where it has none."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    modules = NAMES | QK_NORMS if config.model_type == "qwen3" else NAMES
    match = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in modules:
        return name
    return f"model.layers.{match[1]}.{modules[match[2]]}.{match[3]}"


def weight_of(name: str, tensor: StoredTensor, config: PretrainedConfig) -> Tensor | Blocks:
    """Return a stored tensor, its rows in transformers' order.

    Args:
        name: transformers' name.
    """
    weight = read(tensor)
    if config.model_type == "llama" and re.search(r"\.(q|k)_proj\.", name):
        order = halved(torch.arange(tensor.shape[0]), config.head_dim)
        return weight.take(order) if isinstance(weight, Blocks) else weight[order]
    return weight


def read(tensor: StoredTensor) -> Tensor | Blocks:
    """Return a stored matrix or vector; see ``weights_of``."""
    if (dtype := FLOATS.get(tensor.kind)) is not None:
        floats = torch.from_numpy(tensor.data).view(dtype)
        return floats.clone() if len(tensor.shape) == 1 else floats  # a small view would keep the whole file in memory
    try:  # one row of a matrix shows whether its kind can be read
        numbers = dequantised(tensor.data if len(tensor.shape) == 1 else tensor.data[:1], tensor.kind)
    except NotImplementedError:
        raise ValueError(f"the tensor {tensor.name} is of the type {tensor.kind.name}, which cannot be read") from None
    return numbers if len(tensor.shape) == 1 else Blocks(tensor.kind, torch.from_numpy(tensor.data))


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Return the rows of a rotary projection in llama.cpp's order for Llama, pairs side by side instead of two
    halves."""
    return weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:]).transpose(1, 2).flatten(0, 2)


def halved(weight: Tensor, head_dim: int) -> Tensor:
    """Return the rows of a rotary projection in transformers' order, two halves: the inverse of ``interleaved``."""
    return weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:]).transpose(1, 2).flatten(0, 2)
