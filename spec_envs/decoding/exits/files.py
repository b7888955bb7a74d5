"""An exit's adapter as files: low-rank weights in peft's layout, so that they load on a transformers model, too.

``exit.json`` states what it is for. ``exit_proj/`` is an adapter of ``lm_head`` for the target cut off after the exit
(``num_hidden_layers=exit_layer``), ``lora_S/`` and ``lora_D/`` are adapters of the whole target, and
``attention.safetensors`` holds Kangaroo's attention.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from spec_envs.decoding.exits.adapter import ExitAdapter, ExitSettings
from spec_envs.decoding.model.lora import LowRank
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.files import at_home, parse_json, whole
from spec_envs.sealed import SEAL, digest, first_line

SETTINGS, ATTENTION = "exit.json", "attention.safetensors"
# peft's keys that do not change what the loaded weights compute.
UNREAD = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names of files


@dataclass(frozen=True)
class Stored(ExitSettings):
    """The contents of ``exit.json``, besides the hash that seals them.

    Attributes:
        shortlist: see ``ExitAdapter``.
        files: SHA-256 of the files of weights, by name.
    """

    shortlist: list[int] | None
    files: dict[str, str] | None = None


def is_exit(name: str | Path) -> bool:
    """Return whether a folder holds an exit's adapter."""
    return (at_home(name) / SETTINGS).is_file()


def save_exit(adapter: ExitAdapter, folder: str | Path) -> None:
    """Write an adapter to a folder; if that fails, the folder's earlier files stay.

    Raises:
        OSError: a file could not be written; the sentence names it.
    """
    shortlist = None if adapter.shortlist is None else adapter.shortlist.tolist()
    weights: dict[str, bytes] = {}
    configs: dict[str, bytes] = {}
    for part, meant, tensors in parts(adapter):
        config = peft_config(adapter.settings, meant)
        weights[f"{part}/{WEIGHTS}"], configs[f"{part}/{CONFIG}"] = as_safetensors(tensors), as_json(config)
    if adapter.kind == "kangaroo":
        weights[ATTENTION] = as_safetensors({**adapter.attention.layer(), "norm.weight": adapter.attention.norm})
    settings = asdict(adapter.settings) | {"shortlist": shortlist}
    settings["files"] = {name: hashlib.sha256(data).hexdigest() for name, data in weights.items()}
    by_name = {
        SETTINGS: as_json(settings | {SEAL: sealed(settings)}),
        **configs,
        **weights,
    }  # the first is renamed last
    files = {Path(folder) / name: data for name, data in by_name.items()}
    with ExitStack() as stack:  # renamed when all are written
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(whole(path)).write_bytes(data)


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of one of an exit's files; raise ValueError if it is damaged or missing."""
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name} is damaged or missing ({first_line(error)})") from None


def sealed(settings: dict[str, Any]) -> str:
    """Return the hash of the contents of ``exit.json``, except the target's name, which differs between machines."""
    return digest({key: value for key, value in settings.items() if key != "base_model"})


def load_exit(folder: Path, target: Transformer, name: str) -> ExitAdapter:
    """Read an adapter.

    Args:
        folder: of the adapter.
        target: the model for which it was trained.
        name: of the target here, which may have been called otherwise where the adapter was trained.

    Raises:
        ValueError: a file is missing or damaged, or the adapter belongs to another target.
    """
    try:
        content = parse_json((folder / SETTINGS).read_bytes())
        if isinstance(content, dict) and content.pop(SEAL, None) not in (None, sealed(content)):
            raise ValueError("its contents are not those that were written")
        stored = msgspec.convert(content, Stored)
        if unknown := set(content) - {field.name for field in fields(Stored)}:
            raise ValueError(f"nothing reads its {', '.join(sorted(unknown))}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / SETTINGS} is damaged or missing ({str(error).splitlines()[0]}); train the exit again"
        ) from None
    shortlist = stored.shortlist
    settings = ExitSettings(name, stored.fingerprint, stored.exit_layer, stored.kind, stored.rank)
    adapter = ExitAdapter(target, settings)
    try:
        for part, config, tensors in parts(adapter):
            check_config(config, folder / part / CONFIG)
            take(tensors, read(folder, f"{part}/{WEIGHTS}"))
        if settings.kind == "kangaroo":
            wanted = {**adapter.attention.layer(), "norm.weight": adapter.attention.norm}
            take(wanted, read(folder, ATTENTION))
        for name in [f"{part}/{WEIGHTS}" for part, *_ in parts(adapter)] + [ATTENTION] * (stored.kind == "kangaroo"):
            seal = (stored.files or {}).get(name)
            if seal and hashlib.sha256((folder / name).read_bytes()).hexdigest() != seal:
                raise ValueError(f"{name} is damaged: its contents are not those that were written")
        if shortlist is not None:
            adapter.shortlist = np.unique(np.array(shortlist, np.int64))
            if not len(shortlist) or not 0 <= adapter.shortlist[0] <= adapter.shortlist[-1] < target.shape.vocab:
                raise ValueError("a shortlist of ids that the target does not have")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the exit in {folder}: {str(error).splitlines()[0]}; train it again, or take another folder"
        ) from None
    adapter.touched()
    return adapter


def parts(adapter: ExitAdapter) -> Iterator[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """Yield the low-rank parts: name, the keys of peft's configuration that give them meaning, and tensors by peft's
    names."""
    settings = adapter.settings
    if settings.kind == "layers":
        for name, lora in (("lora_S", adapter.lora_S), ("lora_D", adapter.lora_D)):
            chosen = {"target_modules": lora.products, "layers_to_transform": list(lora.range)}
            tensors: dict[str, Tensor] = {}
            for layer, product, low_rank in lora.parts():
                tensors |= named(f"model.layers.{layer}.self_attn.{product}", low_rank)
            yield name, meaning(settings, lora.alpha, **chosen), tensors
    else:
        alpha = adapter.exit_proj.scale * settings.rank
        yield "exit_proj", meaning(settings, alpha, target_modules=["lm_head"]), named("lm_head", adapter.exit_proj)


def as_json(content: dict[str, Any]) -> bytes:
    """Return the bytes of a JSON file that people can read."""
    return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"


def as_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """Return the bytes of a file of weights."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def named(module: str, low_rank: LowRank) -> dict[str, Tensor]:
    """Return the tensors of an addition by peft's names."""
    return {f"base_model.model.{module}.lora_{side}.weight": getattr(low_rank, f"lora_{side}") for side in "AB"}


def meaning(settings: ExitSettings, alpha: float, **chosen: Any) -> dict[str, Any]:
    """Return the keys of an ``adapter_config.json`` that give low-rank weights their meaning."""
    return {"peft_type": "LORA", "r": settings.rank, "lora_alpha": round(alpha), "bias": "none", **chosen}


def peft_config(settings: ExitSettings, meant: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of an ``adapter_config.json``."""
    from peft import LoraConfig  # takes more than a second to import, and only writing needs it

    said = {key: value for key, value in meant.items() if key != "peft_type"}
    config = LoraConfig(base_model_name_or_path=settings.base_model, task_type="CAUSAL_LM", inference_mode=True, **said)
    written: dict[str, Any] = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}


def check_config(wanted: dict[str, Any], path: Path) -> None:
    """Check that an ``adapter_config.json`` gives the weights beside it the meaning that is computed here.

    The keys of ``wanted`` must have the same values, lists in any order. Any other key that peft has or will have
    (decomposed weights, ranks and scales by module, further modules, …) must switch nothing on.

    Raises:
        ValueError: it does not, or it is no JSON object.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged ({str(error).splitlines()[0]})") from None
    for key, value in {**dict.fromkeys(wanted), **found}.items():
        expected = wanted.get(key)
        same = as_set(value) == as_set(expected) if isinstance(expected, list) else value == expected
        neutral = value in (None, False, [], {}) or key in UNREAD
        neutral |= key == "init_lora_weights" and value in (True, "gaussian")  # other kinds change the target
        if not (same if key in wanted else neutral):
            raise ValueError(
                f"{path.name} says {key} = {value!r:.60}, which is not computed; expected {expected!r:.60}"
            )


def as_set(value: Any) -> Any:
    """Return a list in a fixed order, and any other value as it is."""
    return sorted(map(str, value)) if isinstance(value, list) else value


@torch.no_grad()
def take(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Copy the found tensors into the wanted ones of the same names.

    Raises:
        ValueError: tensors are missing, unknown, or of another shape.
    """
    if differing := sorted(set(wanted) ^ set(found)):
        raise ValueError(f"tensors are missing or unknown: {', '.join(differing[:3])}")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise ValueError(f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
        tensor.copy_(found[name])
