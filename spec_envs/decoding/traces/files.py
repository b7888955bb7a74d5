"""The folder of a trace: a manifest and one array per column, checked as they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.traces.full_trees import level_slice
from spec_envs.decoding.tree import ALTERNATIVES
from spec_envs.files import is_file, whole, write_bytes
from spec_envs.prompts.rows import Split

VERSIONS = {"tree": 2, "chain": 3}  # chains of version 2 have no alternatives
MANIFEST = "manifest.json"
COLUMNS: dict[str, dict[str, Any]] = {
    "tree": {
        "tokens": np.int32,
        "gaps": np.float32,
        "drafted": np.int32,
        "log_probs": np.float32,
        "entropies": np.float32,
        "path": np.int16,
        "ranks": np.int16,
        "copied": np.bool_,
        "matched": np.int16,
    },
    "chain": {
        "tokens": np.int32,
        "gaps": np.float32,
        "drafted": np.int32,
        "log_probs": np.float32,
        "entropies": np.float32,
        "right": np.int16,
        "length": np.int16,
        "copied": np.bool_,
        "matched": np.int16,
        "alternatives": np.int32,
        "alternative_log_probs": np.float32,
    },
}


class Recorded(msgspec.Struct, forbid_unknown_fields=True):
    """A recorded text: its task, its split, the ids of its prompt, and the number of emitted tokens."""

    task: str
    split: Split
    prompt: list[int]
    tokens: int


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """The conditions a trace is valid for.

    Attributes:
        kind: ``"tree"`` or ``"chain"``.
        target, drafter, dtype, template, date, prompts, max_new_tokens: keyword arguments that it was recorded with;
            the date is None if none was set.
        fingerprints: hashes of both models' weights.
        width, max_depth: size of the trees; a chain of ``max_depth + 1`` tokens has width 1.
        vocab, context, eos: size of the target's vocabulary, its context, and the ids that end a text.
        costs: seconds of forwards by rows on the machine that recorded it (``CostTable``).
        made_with: versions, processor and revision.
        texts: the texts, in the order of the arrays' rows.
        arrays: SHA-256 of every column's file.
        block_rows: for a drafter of blocks the rows of each forward besides those of unread tokens; its deeper levels
            take no forward. None for other drafters.
        whole_block: True if these rows are computed however few levels are wanted.
    """

    version: int
    kind: Literal["tree", "chain"]
    target: str
    drafter: str
    fingerprints: dict[str, str]
    dtype: str
    template: str | None
    prompts: str
    max_new_tokens: int
    width: int
    max_depth: int
    vocab: int
    context: int
    eos: list[int]
    costs: dict[str, dict[str, float]]
    made_with: dict[str, Any]
    texts: list[Recorded]
    arrays: dict[str, str]
    date: str | None = None
    block_rows: int | None = None
    whole_block: bool = False

    def rows_of_block(self, max_depth: int) -> int | None:
        """Return the rows of a forward besides those of unread tokens where trees are up to ``max_depth`` expansions
        deep; None for a drafter that makes a forward for each level."""
        if self.block_rows is None or self.whole_block:
            return self.block_rows
        return min(self.block_rows, max_depth)

    def copied_whole(self, max_depth: int) -> int:
        """Return the tokens of the longest chain of copies in front of a head, which is drafted whole however few levels
        are wanted, where trees are up to ``max_depth`` expansions deep; 0 where nothing is copied in front of one."""
        name = DrafterName.parse(self.drafter)
        return min(max_depth, self.max_depth) + 1 if self.kind == "tree" and name.copies and name.model else 0


class RecordedTexts:
    """The texts of a trace, with what was recorded at each of their tokens.

    Attributes:
        folder, manifest: place of the trace, and the conditions that it is valid for.
        texts: the texts of the manifest.
        columns: arrays by name, a row per emitted token, mapped from disk (``trace.py`` lists them).
        starts: ``[texts + 1]``, the row at which each text begins.
        by_prompt: index of a text by the ids of its prompt.
    """

    def __init__(self, folder: Path, manifest: Manifest, columns: dict[str, np.ndarray]):
        self.folder, self.manifest, self.texts, self.columns = folder, manifest, manifest.texts, columns
        self.starts = np.concatenate([[0], np.cumsum([text.tokens for text in self.texts])])
        self.by_prompt = {tuple(text.prompt): i for i, text in enumerate(self.texts)}


def read_folder(folder: Path) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Read a trace's manifest and map its columns.

    Raises:
        ValueError: the folder holds no trace, a damaged one, or one of another version.
    """
    path = folder / MANIFEST
    if not is_file(path):
        raise ValueError(f"there is no trace in {folder}: it has no {MANIFEST}; record one with `spec-envs trace`")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        if manifest.version != VERSIONS[manifest.kind]:
            raise ValueError(f"it is of version {manifest.version}, this is version {VERSIONS[manifest.kind]}")
        check_manifest(manifest)
        rows, columns = sum(text.tokens for text in manifest.texts), {}
        for name, dtype in COLUMNS[manifest.kind].items():
            file = folder / f"{name}.npy"
            if digest(file) != manifest.arrays.get(name):
                raise ValueError(f"{file.name} is not the file that was recorded")
            columns[name] = np.load(file, mmap_mode="r", allow_pickle=False)
            if len(columns[name]) != rows or columns[name].dtype != dtype:
                raise ValueError(f"{file.name} does not have the shape and type that the manifest states")
        check_columns(manifest, columns)
    except (OSError, ValueError, msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"the trace in {folder} is damaged ({error}); delete it and record it again") from None
    return manifest, columns


def check_manifest(manifest: Manifest) -> None:
    """Refuse a manifest with numbers that no recording has.

    Raises:
        ValueError: the message names the first of them.
    """
    if manifest.width < 1 or manifest.max_depth < 0 or manifest.vocab < 1 or manifest.context < 1:
        raise ValueError("its width, max_depth, vocab and context are not all positive")
    if manifest.kind == "chain" and manifest.width != 1:
        raise ValueError(f"its width is {manifest.width}; that of chains is 1")
    if manifest.block_rows is not None and manifest.block_rows < 0:
        raise ValueError(f"its block_rows is {manifest.block_rows}; expected 0 or more")
    most = manifest.max_new_tokens
    if not manifest.texts or any(not 1 <= text.tokens <= most or not text.prompt for text in manifest.texts):
        raise ValueError(f"it has no texts, or some without a prompt, without a token or with more than {most}")
    ids = [*manifest.eos, *(token for text in manifest.texts for token in text.prompt)]
    if min(ids) < 0 or max(ids) >= manifest.vocab:
        raise ValueError(f"it holds ids that are not below {manifest.vocab}")
    for part in ("verify", "draft"):
        curve = manifest.costs.get(part, {})
        if not curve or not all(n.isdecimal() and seconds >= 0 for n, seconds in curve.items()):
            raise ValueError(f"its costs of {part} are not seconds by rows")


def check_columns(manifest: Manifest, columns: dict[str, np.ndarray]) -> None:
    """Refuse columns that do not hold trees, or chains, of the manifest's size.

    Raises:
        ValueError: the message names the first of them.
    """
    width, levels = manifest.width, manifest.max_depth + 1
    nodes = level_slice(levels - 1, width).stop if manifest.kind == "tree" else levels
    shapes: dict[str, tuple[int, ...]] = {"drafted": (nodes,), "log_probs": (nodes,)}
    if manifest.kind == "tree":
        shapes |= {"entropies": (1 + width * manifest.max_depth,), "path": (levels,), "ranks": (levels, levels)}
    else:
        shapes |= {"entropies": (nodes,), "copied": (nodes,)}
        shapes |= dict.fromkeys(("alternatives", "alternative_log_probs"), (nodes, ALTERNATIVES))
    highest = {"tokens": manifest.vocab, "drafted": manifest.vocab, "path": nodes, "ranks": nodes}
    highest["alternatives"] = manifest.vocab
    highest |= {"right": nodes + 1, "length": nodes + 1}
    for name, column in columns.items():
        if column.shape[1:] != shapes.get(name, ()):
            raise ValueError(f"{name}.npy has rows of shape {column.shape[1:]}; expected {shapes.get(name, ())}")
        lowest = -1 if name in ("path", "ranks") else 0
        if name in highest and not lowest <= column.min() <= column.max() < highest[name]:
            raise ValueError(f"{name}.npy holds numbers that are not from {lowest} to {highest[name] - 1}")
        missing = np.isneginf(column) if name.endswith("log_probs") else False  # where there is no node
        if column.dtype.kind == "f" and not (np.isfinite(column) | missing).all():
            raise ValueError(f"{name}.npy holds numbers that are not finite")


def joined(parts: Sequence[dict[str, np.ndarray]], kind: str) -> dict[str, np.ndarray]:
    """Return the columns of a trace, given the columns of each of its texts."""
    return {
        name: np.concatenate([part[name] for part in parts]).astype(dtype, copy=False)
        for name, dtype in COLUMNS[kind].items()
    }


def write_folder(trace: RecordedTexts) -> None:
    """Write a trace to its folder. The manifest comes last: a folder without one holds no trace."""
    for name, column in trace.columns.items():
        file = trace.folder / f"{name}.npy"
        with whole(file) as path, path.open("wb") as stream:
            np.save(stream, column)
        trace.manifest.arrays[name] = digest(file)
    write_bytes(
        trace.folder / MANIFEST, json.dumps(msgspec.to_builtins(trace.manifest), indent=1, allow_nan=False).encode()
    )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
