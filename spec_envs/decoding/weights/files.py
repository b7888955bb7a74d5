"""The weights of a folder in the Hugging Face layout: which files hold them, and the tensors in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from spec_envs.decoding.weights.blocks import Blocks, dense
from spec_envs.decoding.weights.config import first_line, in_fp8, load_config, read_json
from spec_envs.decoding.weights.gguf_file import read_gguf
from spec_envs.decoding.weights.gguf_weights import linked, weights_of

FILES = ("model.safetensors", "pytorch_model.bin")  # whole, or in parts that an index names
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IDS = ("d2t", "t2d", "shortlist")  # tensors of drafters that hold ids


def index_of(file: Path) -> Path:
    """Return the path of the index that a file has if it is in parts."""
    return file.with_name(f"{file.name}.index.json")


def weight_files(folder: Path) -> tuple[list[Path], set[str]]:
    """Return the files of weights that transformers would read, and the names of the tensors in their index.

    Raises:
        ValueError: there are no such files, or some parts are missing.
    """
    for name in FILES:
        file = folder / name
        if file.is_file():
            return [file], set()
        if index_of(file).is_file():
            named = weight_map(index_of(file))
            parts = [folder / part for part in sorted(set(named.values()))]
            if missing := [part.name for part in parts if not part.is_file()]:
                raise ValueError(
                    f"{folder} has no {', '.join(missing[:3])}, of {len(parts)} files that its index names"
                )
            return parts, set(named)
    raise ValueError(f"{folder} holds no weights; expected {' or '.join(FILES)}, or an index and the files it names")


def weight_map(index: Path) -> dict[str, str]:
    """Read an index and return the file name of each tensor.

    Raises:
        ValueError: the index is damaged, or names something other than files beside it.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"cannot read {index} (it has no weight_map); fetch it again")
    for part in found.values():
        if not isinstance(part, str) or not re.fullmatch(r"[\w-][\w.-]*", part):
            raise ValueError(f"cannot read {index} (it names {part!r:.60}); expected files beside it")
    return found


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the state dict of a folder, the weights of a GGUF file in float32; see ``load_stored``."""
    if linked(folder):
        return {name: dense(weight).float() for name, weight in load_stored(folder).items()}
    return load_tensors(folder)


def load_stored(folder: Path) -> dict[str, Tensor | Blocks]:
    """Return the state dict of a folder as it is stored; PyTorch files are read with ``weights_only=True``.

    Raises:
        ValueError: files are missing or cannot be read, tensors are quantised otherwise than in a GGUF file, or an
            adapter lies beside them.
    """
    if gguf := linked(folder):
        return weights_of(read_gguf(gguf[0]), load_config(folder))
    return {**load_tensors(folder)}


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the state dict of a folder that has files of weights itself; see ``load_stored``."""
    weights: dict[str, Tensor] = {}
    files, named = weight_files(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json) beside its weights, which is not applied here; merge it "
            "into them, as with peft's merge_and_unload, or remove it"
        )
    config = read_json(folder / "config.json")
    if in_fp8(config):
        check_blocks(files, config)
        return multiplied_out(folder)
    for file in files:
        for name, tensor in tensors_of(file):
            if name in weights:
                raise ValueError(f"the tensor {name} is in two files of {folder}; fetch the model again")
            weights[name] = tensor
    if missing := sorted(named - weights.keys()):
        raise ValueError(f"the files of {folder} lack {missing[0]}, which their index names; fetch the model again")
    return weights


def check_blocks(files: list[Path], config: dict[str, Any]) -> None:
    """Refuse FP8 weights whose blocks transformers would misread.

    It divides the size of a weight by that of its scales, which is the size of a block only if all blocks are whole or
    there is only one.

    Raises:
        ValueError: a weight does not consist of whole blocks.
    """
    block = config["quantization_config"].get("weight_block_size") or (128, 128)
    sizes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                sizes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    for name, scales in sizes.items():
        size = sizes.get(name.removesuffix("_scale_inv"), ())
        if not name.endswith("_scale_inv") or len(size) != len(scales) or len(size) != len(block):
            continue  # left to transformers, which dequantises it
        for rows, count, of in zip(size, scales, block, strict=True):
            if count != -(-rows // of) or (count > 1 and rows % of):
                raise ValueError(
                    f"the FP8 weight {name.removesuffix('_scale_inv')} is {list(size)} with {list(scales)} scales for "
                    f"blocks of {list(block)}, which are not whole; take its weights in bfloat16"
                )


def multiplied_out(folder: Path) -> dict[str, Tensor]:
    """Return the weights of an FP8 checkpoint in float32, multiplied by their scales.

    Raises:
        ValueError: transformers cannot read all tensors, or some are missing.
    """
    method = FineGrainedFP8Config(dequantize=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=method, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # scales of any content make transformers raise any exception
        raise ValueError(f"cannot multiply out the FP8 weights of {folder}: {first_line(error)}") from None
    model, report = loaded
    if wrong := [str(key) for found in report.values() for key in found]:
        raise ValueError(
            f"transformers does not read the FP8 weights of {folder} in all their parts: "
            f"{', '.join(sorted(wrong)[:3])}; take its weights in bfloat16"
        )
    weights: dict[str, Tensor] = model.state_dict()
    return weights


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a file.

    Raises:
        ValueError: the file cannot be read, or a tensor is quantised.
    """
    try:
        safe = file.suffix == ".safetensors"
        loaded = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
            raise ValueError("it holds something else than tensors by name")
    except Exception as error:  # damaged files make the libraries raise any exception
        raise ValueError(
            f"cannot read the weights {file}: {first_line(error)}; delete it and fetch or convert it again"
        ) from None
    for name, tensor in loaded.items():
        if name.rpartition(".")[2] not in IDS and (tensor.dtype not in FLOATS or tensor.layout != torch.strided):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"the tensor {name} of {file} is {kind}, so that the model is quantised; expected weights in "
                "float32, bfloat16 or float16, or a GGUF file"
            )
        yield name, tensor
