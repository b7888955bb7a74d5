"""Traces: the drafts of a drafter at every position of the target's own texts, recorded once.

Under greedy decoding neither the text nor the drafter's state depends on what was drafted before. So the whole tree (or
chain) drafted at each position answers every depth, budget and length exactly, without a model (``replay.py``).

A trace is a folder: ``manifest.json``, which states the conditions it is valid for, and one memory-mapped array per
column, with a row per emitted token. Row i of a text is the state in which its tokens 0…i are emitted.

| column | trees | chains |
|---|---|---|
| ``tokens``, ``gaps`` | the text; how far the target's best logit lay above the second | the same |
| ``drafted``, ``log_probs`` | ``[C]`` nodes of the full tree, level by level | ``[K]`` tokens |
| ``entropies`` | of the distribution after the root and after each node that was expanded | after each token |
| ``path`` | ``[L]`` which node of each level is on the text's path, -1 for none | |
| ``ranks`` | ``[L, L]`` for each depth, the place of that node among all candidates up to it | |
| ``alternatives``, ``alternative_log_probs`` | | ``[K, 3]`` further tokens of the distribution of each |
| ``right``, ``length`` | | how many of the first tokens are the text's; tokens drafted |
| ``copied`` | whether the tree is of copies, which take no forward | ``[K]`` which tokens were copied |
| ``matched`` | how many of the text's last tokens occurred in it before | the same |

A tree may have fewer nodes than a full one: where a node is missing, its ``log_probs`` is −inf, and so are the
``alternative_log_probs`` of a token without alternatives, such as a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spec_envs.decoding.clock import CostTable, WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.names import static_over_plain
from spec_envs.decoding.traces.files import MANIFEST, Manifest, RecordedTexts, read_folder
from spec_envs.decoding.traces.recording import EVERY, MAX_NEW_TOKENS, Problem, Recording, chosen
from spec_envs.decoding.traces.replay import replayed
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.files import at_home, is_file
from spec_envs.text import Detokenizer

# A gap of logits below which rounding decides the target's choice, by dtype.
TIE = {"float32": 1e-4, "int8": 1e-4, "q4": 1e-4}
COARSE = 0.25  # the same in dtypes with coarser rounding


class Trace(RecordedTexts, Recording):
    """A recorded trace, its columns mapped from disk."""

    def __init__(self, folder: Path, manifest: Manifest, columns: dict[str, np.ndarray]):
        super().__init__(folder, manifest, columns)
        self.name = str(folder)
        self.static_over_plain = static_over_plain(manifest.target, manifest.drafter)
        self.max_new_tokens = min(MAX_NEW_TOKENS, manifest.max_new_tokens)

    def __reduce__(self) -> tuple[Callable[..., Trace], tuple[str]]:
        """Pickle a trace as the path of its folder; a copy is the same object."""
        return Trace.load, (str(self.folder),)

    @classmethod
    def load(cls, source: str | Path) -> Trace:
        """Return the trace in a folder, read once per process.

        Raises:
            ValueError: the folder holds no trace, a damaged one, or one of another version.
        """
        return _loaded(at_home(source).resolve())

    @staticmethod
    def named(source: str) -> bool:
        """Return True if a name is the folder of a trace."""
        return is_file(at_home(source) / MANIFEST)

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def rows(self) -> int:
        """Number of tokens emitted in all texts, which is the number of rows of every column."""
        return int(self.starts[-1])

    def costs(self) -> CostTable:
        """Return the cost table of the machine that recorded it."""
        verify, draft = (
            {int(n): s for n, s in self.manifest.costs.get(part, {}).items()} for part in ("verify", "draft")
        )
        return CostTable(self.name, verify, draft)

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self.manifest, name) for name in ("target", "drafter", "dtype", "template", "date")}

    def ties(self) -> np.ndarray:
        """Return True for the rows at which rounding decides the target's next token, ``[rows]``."""
        return self.columns["gaps"] < TIE.get(self.manifest.dtype, COARSE)

    def of_split(self, split: str, names: str = EVERY) -> list[int]:
        """Return the indices of the texts of a split and of prompt sets; see ``recording.chosen``.

        Raises:
            ValueError: there are none.
        """
        return chosen(self.name, self.texts, split, names)

    def prompts(self, split: str, names: str = EVERY) -> list[tuple[str, list[int]]]:
        return [(self.texts[i].task, self.texts[i].prompt) for i in self.of_split(split, names)]

    def check(self, problem: Problem, max_new_tokens: int | None = None) -> None:
        """Refuse trees, chains and texts other than those that were recorded.

        Raises:
            ValueError: another kind or width, more depth, or more tokens than were recorded.
        """
        made = self.manifest
        if made.kind != problem.trace_kind:
            instead = f"give one of {problem.trace_kind}s" if problem.trace_kind else "no trace does, it needs models"
            raise ValueError(f"the trace {self.name} has {made.kind}s, which do not replay {problem.env_id}; {instead}")
        if problem.width != made.width:
            raise ValueError(
                f"the trace {self.name} was recorded with width {made.width}, not {problem.width}; pass the former, or "
                "record another trace"
            )
        if problem.max_depth > made.max_depth:
            raise ValueError(
                f"the trace {self.name} is {made.max_depth} expansions deep, but max_depth is {problem.max_depth}; draft "
                f"less (max_depth and depths of at most {made.max_depth}, k_max and sizes of at most {made.max_depth + 1}), or "
                "record a deeper trace"
            )
        if max_new_tokens is not None and max_new_tokens > made.max_new_tokens:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; the texts of {self.name} were recorded to {made.max_new_tokens}"
            )

    def decoder(self, problem: Problem, clock: WallClock) -> Decoder:
        self.check(problem)
        words = Detokenizer.when_needed(lambda: load_tokenizer(self.manifest.target))
        return replayed(self, clock, problem.max_depth, words)


@functools.lru_cache(8)
def _loaded(folder: Path) -> Trace:
    return Trace(folder, *read_folder(folder))
