"""Write a draft model that uses its target's embedding as a GGUF file of its own, with which llama-server can draft.

llama.cpp has no shortlists: the file holds the target's tokenizer and its whole embedding, which serves as output rows,
too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.weights.checkpoints import CACHE, cache_lock, sha256
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.decoding.weights.gguf_weights import NAMES, interleaved
from spec_envs.files import whole

KEPT = ("token_embd.weight", "output.weight", "rope_freqs.weight")  # tensors that are taken from the target


def exported(folder: Path, target: Path) -> Path:
    """Return the GGUF file of a draft model's folder for a target's GGUF file. It is written to the cache at its first
    use, under a name made of both files' hashes."""
    digest = f"{sha256(folder / 'model.safetensors')[:12]}-{sha256(target)[:12]}"
    path = CACHE / "gguf" / f"{folder.name}-{digest}.gguf"
    if not path.is_file():
        with cache_lock(path):
            if not path.is_file():  # another process may have written it meanwhile
                with whole(path) as temporary:
                    write(folder, target, temporary)
    return path


def write(folder: Path, target: Path, path: Path) -> None:
    """Write the file: the target's metadata, tokenizer and embedding, and the draft model's layers in 8 bits (Q8_0)."""
    shape, weights, reader = Shape.from_config(load_config(folder)), load_weights(folder), GGUFReader(target)
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama":
        raise ValueError(f"{target} is of the architecture {architecture!r}; only a Llama's draft model can be written")
    writer = GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = shape.layers if name == f"{architecture}.block_count" else field.contents()
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], inner)
    for tensor in reader.tensors:
        if tensor.name in KEPT:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].float().numpy())
    for i in range(shape.layers):
        for there, here in NAMES.items():
            weight = weights[f"model.layers.{i}.{here}.weight"]
            if there in ("attn_q", "attn_k"):
                weight = interleaved(weight, shape.head_dim)
            name, values = f"blk.{i}.{there}.weight", weight.float().numpy()
            if values.ndim == 1:
                writer.add_tensor(name, values)
            else:
                kind = GGMLQuantizationType.Q8_0
                writer.add_tensor(name, quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
