"""An exit's adapter as files: low-rank weights in peft's layout, so that they load on a transformers model, too.

``exit.json`` says what it is for. ``exit_proj/`` is an adapter of ``lm_head`` for the target cut off behind the exit
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
# Keys of peft's that do not change what loaded weights compute.
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
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names


@dataclass(frozen=True)
class Stored(ExitSettings):
    """What ``exit.json`` holds: also the SHA-256 of the files of weights, and of all that it says itself."""

    shortlist: list[int] | None
    files: dict[str, str] | None = None


def is_exit(name: str | Path) -> bool:
    """Whether a folder holds an exit's adapter."""
    return (at_home(name) / SETTINGS).is_file()


def save_exit(adapter: ExitAdapter, folder: Path) -> None:
    """Write an adapter; where that fails, what was there before stays.

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
    files = {folder / name: data for name, data in by_name.items()}
    with ExitStack() as stack:  # renamed when all are written
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(whole(path)).write_bytes(data)


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one of an exit's files."""
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{name} is damaged or missing ({first_line(error)})") from None


def sealed(settings: dict[str, Any]) -> str:
    """Return the hash of what ``exit.json`` says, but for the name that the target has somewhere."""
    return digest({key: value for key, value in settings.items() if key != "base_model"})


def load_exit(folder: Path, target: Transformer, name: str) -> ExitAdapter:
    """Read an adapter for a target that is called ``name`` here, whatever it was called where the adapter was trained.

    Raises:
        ValueError: a file that is missing or damaged, or an adapter of another target.
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
    """The low-rank parts: name, what peft's configuration says of their meaning, and tensors by peft's names."""
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
    """For a file that people may read."""
    return json.dumps(content, indent=2, allow_nan=False).encode() + b"\n"


def as_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """For a file of weights."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def named(module: str, low_rank: LowRank) -> dict[str, Tensor]:
    """Tensors of an addition by the names that peft has for it."""
    return {f"base_model.model.{module}.lora_{side}.weight": getattr(low_rank, f"lora_{side}") for side in "AB"}


def meaning(settings: ExitSettings, alpha: float, **chosen: Any) -> dict[str, Any]:
    """What must be said of low-rank weights in an ``adapter_config.json``."""
    return {"peft_type": "LORA", "r": settings.rank, "lora_alpha": round(alpha), "bias": "none", **chosen}


def peft_config(settings: ExitSettings, meant: dict[str, Any]) -> dict[str, Any]:
    """The contents of an ``adapter_config.json``."""
    from peft import LoraConfig  # takes more than a second, and only files that are written need it

    said = {key: value for key, value in meant.items() if key != "peft_type"}
    config = LoraConfig(base_model_name_or_path=settings.base_model, task_type="CAUSAL_LM", inference_mode=True, **said)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def check_config(wanted: dict[str, Any], path: Path) -> None:
    """Refuse an ``adapter_config.json`` by which the weights beside it mean something else than is computed here.

    The keys of ``wanted`` must say the same, in any order of their lists; any other key that peft has or will have (weights
    that are decomposed, ranks and scales by module, further modules, …) must switch nothing on.

    Raises:
        ValueError: there is another one; or no such file, or no JSON object in it.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
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
    """A list without its order."""
    return sorted(map(str, value)) if isinstance(value, list) else value


@torch.no_grad()
def take(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Copy tensors by name.

    Raises:
        ValueError: some are missing, too many, or of another shape.
    """
    if differing := sorted(set(wanted) ^ set(found)):
        raise ValueError(f"tensors are missing or unknown: {', '.join(differing[:3])}")
    for name, tensor in wanted.items():
        if tensor.shape != found[name].shape:
            raise ValueError(f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}")
        tensor.copy_(found[name])
