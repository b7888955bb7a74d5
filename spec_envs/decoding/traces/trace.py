"""Traces: what a drafter says at every position of the target's own texts, recorded once.

Under greedy decoding neither the text nor the drafter's state depends on what was drafted before. So the whole tree (or
chain) drafted at each position answers every depth, budget and length exactly, with no model in the loop (``replay.py``).

A trace is a folder: ``manifest.json``, which says what it is valid for, and one memory-mapped array per column, with a
row per emitted token: row i of a text is the state in which its tokens 0…i are emitted.

| column | trees | chains |
|---|---|---|
| ``tokens``, ``gaps`` | the text; how far the target's best logit lay above the second | the same |
| ``drafted``, ``log_probs`` | ``[C]`` nodes of the full tree, level by level | ``[K]`` tokens |
| ``entropies`` | of the distribution behind the root and behind each node that was expanded | behind each token |
| ``path`` | ``[L]`` which node of each level is on the text's path, -1 for none | |
| ``ranks`` | ``[L, L]`` for each depth, the place of that node among all candidates up to it | |
| ``right`` | | how many of the first tokens are the text's |
| ``length``, ``copied``, ``matched`` | | tokens drafted; which were copied; tokens that match where it copies from |
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from spec_envs.decoding.clock import CostTable
from spec_envs.files import at_home, is_file, whole, write_bytes
from spec_envs.prompts.sets import FURTHER

VERSION = 1
MANIFEST = "manifest.json"
MAX_NEW_TOKENS = 128  # of a text where nothing else is said
COLUMNS: dict[str, dict[str, Any]] = {
    "tree": {
        "tokens": np.int32,
        "gaps": np.float32,
        "drafted": np.int32,
        "log_probs": np.float32,
        "entropies": np.float32,
        "path": np.int16,
        "ranks": np.int16,
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
    },
}
TIE = {"float32": 1e-4, "int8": 1e-4}  # a gap of logits below which the target's choice is one of rounding;
COARSE = 0.25  # in dtypes that round more than those


class Recorded(msgspec.Struct, forbid_unknown_fields=True):
    """A recorded text: its task, its split, the ids of its prompt, and how many tokens were emitted."""

    task: str
    split: Literal["train", "validation", "test"]
    prompt: list[int]
    tokens: int


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """What a trace is valid for.

    Attributes:
        kind: ``"tree"`` or ``"chain"``.
        target, drafter, dtype, template, date, prompts, max_new_tokens: keyword arguments that it was recorded with; the
            date is None where none was set.
        fingerprints: of both models' weights.
        width, max_depth: of the trees; a chain of ``max_depth + 1`` tokens has width 1.
        vocab, context, eos: of the target.
        costs: seconds of forwards by rows on the machine that recorded it (``CostTable``).
        made_with: versions, processor and revision.
        texts: in the order of the arrays' rows.
        arrays: SHA-256 of every column's file.
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


class Trace:
    """A recorded trace, its columns mapped from disk.

    Attributes:
        folder, manifest, texts: see ``Manifest``.
        starts: ``[texts + 1]``, the row at which each text begins.
        columns: by name; see the module.
    """

    def __init__(self, folder: Path, manifest: Manifest, columns: dict[str, np.ndarray]):
        self.folder, self.manifest, self.texts, self.columns = folder, manifest, manifest.texts, columns
        self.starts = np.concatenate([[0], np.cumsum([text.tokens for text in self.texts])])
        self.by_prompt = {tuple(text.prompt): i for i, text in enumerate(self.texts)}

    def __reduce__(self) -> tuple[Callable[..., Trace], tuple[str]]:
        """A copy is the same trace; a pickled one is read from its folder again."""
        return Trace.load, (str(self.folder),)

    @classmethod
    def load(cls, source: str | Path) -> Trace:
        """The trace in a folder.

        Raises:
            ValueError: there is none, it is damaged, or it is of another version.
        """
        return _loaded(at_home(source).resolve())

    @staticmethod
    def named(source: str) -> bool:
        """Whether a name is that of such a trace, and not of another kind of recording."""
        return is_file(at_home(source) / MANIFEST)

    @staticmethod
    def longest(max_new_tokens: int | None, source: str | None) -> int:
        """Most tokens of a text: where none are given ``MAX_NEW_TOKENS``, or as many as a trace was recorded with."""
        if max_new_tokens is not None:
            return max_new_tokens
        recorded = Trace.load(source).manifest.max_new_tokens if source and Trace.named(source) else MAX_NEW_TOKENS
        return min(MAX_NEW_TOKENS, recorded)

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def rows(self) -> int:
        """Tokens emitted in all texts, and so rows of every column."""
        return int(self.starts[-1])

    def costs(self) -> CostTable:
        """What forwards cost on the machine that recorded it."""
        verify, draft = (
            {int(n): s for n, s in self.manifest.costs.get(part, {}).items()} for part in ("verify", "draft")
        )
        return CostTable(str(self.folder), verify, draft)

    def ties(self) -> np.ndarray:
        """Rows at which the target's next token is one of rounding ``[rows]`` (bool)."""
        return self.columns["gaps"] < TIE.get(self.manifest.dtype, COARSE)

    def of_split(self, split: str, prompts: str = "all") -> list[int]:
        """Indices of the texts of a split (``"all"`` for every one) and of those prompt sets.

        Raises:
            ValueError: there are none.
        """
        chosen = tasks_named(prompts, {text.task for text in self.texts}, str(self.folder))
        found = [i for i, text in enumerate(self.texts) if split in (text.split, "all") and text.task in chosen]
        if not found:
            raise ValueError(f"the trace {self.folder} has no texts of the prompts {prompts!r} in the split {split!r}")
        return found

    def check(self, width: int, max_depth: int, max_new_tokens: int | None = None) -> None:
        """Refuse trees, chains and texts other than those that were recorded.

        Raises:
            ValueError: another width, or more depth or tokens.
        """
        made = self.manifest
        if width != made.width:
            raise ValueError(f"the trace {self.folder} was recorded with width {made.width}, not {width}")
        if max_depth > made.max_depth:
            raise ValueError(f"the trace {self.folder} is {made.max_depth} expansions deep; {max_depth} are asked for")
        if max_new_tokens is not None and max_new_tokens > made.max_new_tokens:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; the texts of {self.folder} were recorded up to "
                f"{made.max_new_tokens}"
            )


def tasks_named(names: str, tasks: Collection[str], trace: str) -> set[str]:
    """Return those of a trace's tasks that ``names``, separated by commas, ask for. ``"all"`` is every one; beside it a
    shipped prompt set may stand of which the trace has none.

    Raises:
        ValueError: a name that is none of them.
    """
    chosen = {name.strip() for name in names.split(",")}
    known = {"all", *tasks, *(FURTHER if "all" in chosen else ())}
    if unknown := sorted(chosen - known):
        raise ValueError(
            f"the trace {trace!r} has no texts of the prompts {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(sorted(tasks))}"
        )
    return set(tasks) if "all" in chosen else chosen


@functools.lru_cache(8)
def _loaded(folder: Path) -> Trace:
    path = folder / MANIFEST
    if not is_file(path):
        raise ValueError(f"there is no trace in {folder}: it has no {MANIFEST}; record one with `make trace`")
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        if manifest.version != VERSION:
            raise ValueError(f"it is of version {manifest.version}, this is version {VERSION}")
        check_manifest(manifest)
        rows, columns = sum(text.tokens for text in manifest.texts), {}
        for name, dtype in COLUMNS[manifest.kind].items():
            file = folder / f"{name}.npy"
            if digest(file) != manifest.arrays.get(name):
                raise ValueError(f"{file.name} is not the file that was recorded")
            columns[name] = np.load(file, mmap_mode="r", allow_pickle=False)
            if len(columns[name]) != rows or columns[name].dtype != dtype:
                raise ValueError(f"{file.name} has another shape or type than the manifest says")
        check_columns(manifest, columns)
    except (OSError, ValueError, msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"the trace in {folder} is damaged ({error}); delete it and record it anew") from None
    return Trace(folder, manifest, columns)


def check_manifest(manifest: Manifest) -> None:
    """Refuse numbers that no recording has.

    Raises:
        ValueError: the sentence says which.
    """
    if manifest.width < 1 or manifest.max_depth < 0 or manifest.vocab < 1 or manifest.context < 1:
        raise ValueError("its width, max_depth, vocab and context are not all positive")
    if manifest.kind == "chain" and manifest.width != 1:
        raise ValueError(f"its width is {manifest.width}; that of chains is 1")
    if not manifest.texts or any(text.tokens < 1 or not text.prompt for text in manifest.texts):
        raise ValueError("it has no texts, or some without a token or a prompt")
    ids = [*manifest.eos, *(token for text in manifest.texts for token in text.prompt)]
    if min(ids) < 0 or max(ids) >= manifest.vocab:
        raise ValueError(f"it holds ids that are not below {manifest.vocab}")
    for part in ("verify", "draft"):
        curve = manifest.costs.get(part, {})
        if not curve or not all(n.isdecimal() and seconds >= 0 for n, seconds in curve.items()):
            raise ValueError(f"its costs of {part} are not seconds by rows")


def check_columns(manifest: Manifest, columns: dict[str, np.ndarray]) -> None:
    """Refuse columns that are not those of trees, or chains, of the manifest's size.

    Raises:
        ValueError: the sentence says which.
    """
    width, levels = manifest.width, manifest.max_depth + 1
    nodes = level_slice(levels - 1, width).stop if manifest.kind == "tree" else levels
    shapes: dict[str, tuple[int, ...]] = {"drafted": (nodes,), "log_probs": (nodes,)}
    if manifest.kind == "tree":
        shapes |= {"entropies": (1 + width * manifest.max_depth,), "path": (levels,), "ranks": (levels, levels)}
    else:
        shapes |= {"entropies": (nodes,), "copied": (nodes,)}
    highest = {"tokens": manifest.vocab, "drafted": manifest.vocab, "path": nodes, "ranks": nodes}
    highest |= {"right": nodes + 1, "length": nodes + 1}
    for name, column in columns.items():
        if column.shape[1:] != shapes.get(name, ()):
            raise ValueError(f"{name}.npy has rows of shape {column.shape[1:]}; expected {shapes.get(name, ())}")
        lowest = -1 if name in ("path", "ranks") else 0
        if name in highest and not lowest <= column.min() <= column.max() < highest[name]:
            raise ValueError(f"{name}.npy holds numbers that are not from {lowest} to {highest[name] - 1}")
        if column.dtype.kind == "f" and np.isnan(column).any():
            raise ValueError(f"{name}.npy holds numbers that are not finite")


def joined(parts: Sequence[dict[str, np.ndarray]], kind: str) -> dict[str, np.ndarray]:
    """The columns of a trace from those of its texts."""
    return {
        name: np.concatenate([part[name] for part in parts]).astype(dtype, copy=False)
        for name, dtype in COLUMNS[kind].items()
    }


def write_trace(trace: Trace) -> None:
    """Write a trace to its folder; the manifest last, without which there is none."""
    for name, column in trace.columns.items():
        file = trace.folder / f"{name}.npy"
        with whole(file) as path, path.open("wb") as stream:
            np.save(stream, column)
        trace.manifest.arrays[name] = digest(file)
    write_bytes(
        trace.folder / MANIFEST, json.dumps(msgspec.to_builtins(trace.manifest), indent=1, allow_nan=False).encode()
    )


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Grown(NamedTuple):
    """Full trees ``[rows, C]``: path log-probability and parent of every node, and ``[rows, L, W]`` the nodes of each
    level that were expanded, best first."""

    scores: np.ndarray
    parents: np.ndarray
    frontiers: np.ndarray


def grown(log_probs: np.ndarray, width: int) -> Grown:
    """The trees that children of these log-probabilities ``[rows, C]`` make, as ``Tree`` grows them."""
    rows, nodes = log_probs.shape
    levels = 1 + (nodes - width) // (width * width)
    scores, parents = np.empty((rows, nodes), np.float32), np.full((rows, nodes), -1, np.int16)
    frontiers = np.empty((rows, levels, width), np.int16)
    scores[:, :width] = log_probs[:, :width]
    frontiers[:, 0] = np.arange(width)
    for level in range(1, levels):
        here = level_slice(level, width)
        above = frontiers[:, level - 1]
        children = log_probs[:, here].reshape(rows, width, width)
        scores[:, here] = (np.take_along_axis(scores, above.astype(np.intp), 1)[:, :, None] + children).reshape(
            rows, -1
        )
        parents[:, here] = np.repeat(above, width, 1)
        frontiers[:, level] = here.start + np.argsort(-scores[:, here], 1, kind="stable")[:, :width]
    return Grown(scores, parents, frontiers)


def level_slice(level: int, width: int) -> slice:
    """Ids of the nodes of a level of a full tree."""
    start = width + width * width * (level - 1) if level else 0
    return slice(start, width + width * width * level)


def on_path(tree: Grown, drafted: np.ndarray, text: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Which nodes of full trees lie on the path of the text, and their place among the candidates.

    Args:
        tree, drafted: the trees of a whole text, ``[n, …]``; the one in row i is drafted behind token i.
        text: its tokens ``[n]``.

    Returns:
        ``path`` ``[n, L]`` and ``ranks`` ``[n, L, L]``; see the module.
    """
    n, levels = tree.frontiers.shape[:2]
    path = np.full((n, levels), -1, np.int16)
    above = np.full(n, -1)
    alive = np.ones(n, bool)
    for level in range(levels):
        here = level_slice(level, width)
        wanted = np.full(n, -1)
        wanted[: max(0, n - 1 - level)] = text[1 + level :]
        hit = (drafted[:, here] == wanted[:, None]) & (tree.parents[:, here] == above[:, None]) & alive[:, None]
        alive = hit.any(1)
        above = np.where(alive, here.start + hit.argmax(1), -2)
        path[:, level] = np.where(alive, above, -1)
    ranks = np.full((n, levels, levels), -1, np.int16)
    ids = np.arange(tree.scores.shape[1])
    for level in range(levels):
        node = path[:, level].astype(np.intp)
        own = np.take_along_axis(tree.scores, np.maximum(node, 0)[:, None], 1)
        better = (tree.scores > own) | ((tree.scores == own) & (ids < node[:, None]))
        counts = better.cumsum(1)
        for depth in range(level, levels):
            ranks[:, depth, level] = np.where(node >= 0, counts[:, level_slice(depth, width).stop - 1], -1)
    return path, ranks
