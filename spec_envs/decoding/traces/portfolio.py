"""Traces of a portfolio: a folder with a trace of every drafter over the same texts.

Under greedy decoding the text does not depend on who drafts, and a drafter's proposals depend on the text alone, so the
traces of the drafters together answer every choice between them. The folder has ``portfolio.json``, which names the
drafters, and a trace of each in a folder of its own (``trace.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from spec_envs.decoding.clock import CostTable, WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.drafters.portfolio import SEPARATOR, Portfolio
from spec_envs.decoding.traces.recording import EVERY, Problem, Recording
from spec_envs.decoding.traces.replay import ReplayVerifier, drafter_of
from spec_envs.decoding.traces.trace import Trace
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.files import at_home, is_file, write_bytes
from spec_envs.text import Detokenizer

CONTENTS = "portfolio.json"
VERSION = 1


class Contents(msgspec.Struct, forbid_unknown_fields=True):
    """The names of the drafters, and the folder of the trace of each, in their order."""

    version: int
    drafters: dict[str, str]


class Member(NamedTuple):
    """The properties of a problem that the trace of one of its drafters depends on; see ``Problem``."""

    env_id: str
    trace_kind: str
    width: int
    max_depth: int
    drafters: tuple[str, ...] = ()
    depths: tuple[int, ...] = ()


class PortfolioTrace(Recording):
    """Recorded traces of several drafters over the same texts.

    Attributes:
        folder: place of the traces.
        traces: by the drafter's name, in order.
        manifest, texts, starts, by_prompt, columns: those of the first trace; all of them have the same texts.
    """

    def __init__(self, folder: Path, traces: dict[str, Trace]):
        self.folder, self.name, self.traces = folder, str(folder), traces
        self.first = first = next(iter(traces.values()))
        self.manifest, self.texts, self.starts, self.columns = first.manifest, first.texts, first.starts, first.columns
        self.by_prompt = first.by_prompt
        self.static_over_plain = max(trace.static_over_plain for trace in traces.values())
        self.max_new_tokens = first.max_new_tokens

    def __reduce__(self) -> tuple[Callable[..., PortfolioTrace], tuple[str]]:
        """Pickle the traces as the path of their folder; a copy is the same object."""
        return PortfolioTrace.load, (str(self.folder),)

    @classmethod
    def load(cls, source: str | Path) -> PortfolioTrace:
        """Return the traces in a folder, read once per process.

        Raises:
            ValueError: the folder holds none, damaged ones, or traces of different texts.
        """
        return _loaded(at_home(source).resolve())

    @staticmethod
    def named(source: str) -> bool:
        """Return True if a name is the folder of a portfolio's traces."""
        return is_file(at_home(source) / CONTENTS)

    @property
    def rows(self) -> int:
        """Number of tokens emitted in all texts, which is the number of rows of every column."""
        return self.first.rows

    def costs(self) -> CostTable:
        """Return the cost table of the machine that recorded them, with a curve for each drafter that makes
        forwards."""
        tables = {name: trace.costs() for name, trace in self.traces.items()}
        reading = {name: table.draft for name, table in tables.items() if DrafterName.parse(name).model}
        verify = max((table.verify for table in tables.values()), key=len)
        return CostTable(self.name, verify, next(iter(reading.values()), self.first.costs().draft), reading)

    def settings(self) -> dict[str, Any]:
        return self.first.settings() | {"drafter": SEPARATOR.join(self.traces)}

    def ties(self) -> np.ndarray:
        """Return True for the rows at which rounding decides the target's next token, ``[rows]``."""
        return self.first.ties()

    def of_split(self, split: str, names: str = EVERY) -> list[int]:
        """Return the indices of the texts of a split and of prompt sets; see ``recording.chosen``.

        Raises:
            ValueError: there are none.
        """
        return self.first.of_split(split, names)

    def prompts(self, split: str, names: str = EVERY) -> list[tuple[str, list[int]]]:
        return self.first.prompts(split, names)

    def check(self, problem: Problem, max_new_tokens: int | None = None) -> None:
        if not problem.drafters:
            raise ValueError(
                f"the trace {self.name} is of several drafters; give {problem.env_id} the trace of one of them, such as "
                f"{self.first.folder}"
            )
        if problem.drafters != tuple(self.traces):
            raise ValueError(
                f"the trace {self.name} is of the drafters {SEPARATOR.join(self.traces)}, but the problem has "
                f"{SEPARATOR.join(problem.drafters)}; pass drafter={SEPARATOR.join(self.traces)!r}"
            )
        for trace in self.traces.values():
            draws_trees = trace.kind == "tree" and problem.width > 1
            each = trace.manifest.block_rows is None  # a block is as long as any drafter drafts
            depth = max(problem.depths) if draws_trees and each else problem.max_depth
            width = problem.width if trace.kind == "tree" else 1
            trace.check(Member(problem.env_id, trace.kind, width, depth), max_new_tokens)

    def decoder(self, problem: Problem, clock: WallClock) -> Decoder:
        self.check(problem)
        words = Detokenizer.when_needed(lambda: load_tokenizer(self.manifest.target))
        names = [DrafterName.parse(name) for name in self.traces]
        portfolio = Portfolio(
            names, [drafter_of(trace, problem.max_depth) for trace in self.traces.values()], problem.width
        )
        return Decoder(ReplayVerifier(self.first), portfolio, clock, self.manifest.eos, problem.max_depth, words)


@functools.lru_cache(8)
def _loaded(folder: Path) -> PortfolioTrace:
    path = folder / CONTENTS
    try:
        contents = msgspec.json.decode(path.read_bytes(), type=Contents)
        if contents.version != VERSION or not contents.drafters:
            raise ValueError(f"it is of version {contents.version} with {len(contents.drafters)} drafters")
        if not all(Path(place).name == place != ".." for place in contents.drafters.values()):
            raise ValueError("it names places that are not folders beside it")
    except (OSError, ValueError, msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete {folder} and record the trace again") from None
    traces = {name: Trace.load(folder / place) for name, place in contents.drafters.items()}
    check_drafters(traces)
    check_same_texts(list(traces.values()))
    return PortfolioTrace(folder, traces)


def check_drafters(traces: Mapping[str, Trace]) -> None:
    """Refuse traces of other drafters than those that they stand for.

    Args:
        traces: by the drafter's name.

    Raises:
        ValueError: the message names the first one.
    """
    for name, trace in traces.items():
        if trace.manifest.drafter != name:
            raise ValueError(
                f"the trace {trace.folder} is of the drafter {trace.manifest.drafter!r}, but {CONTENTS} beside it says "
                f"{name!r}; delete {trace.folder.parent} and record it again"
            )


def check_same_texts(traces: Sequence[Trace]) -> None:
    """Refuse traces of different texts.

    Raises:
        ValueError: the message names two of them.
    """
    first, *others = traces
    for other in others:
        if first.texts != other.texts or not np.array_equal(first.columns["tokens"], other.columns["tokens"]):
            raise ValueError(
                f"the traces {first.folder} and {other.folder} are of different texts; delete both and record them again"
            )


def write_contents(folder: Path, places: dict[str, str]) -> None:
    """Write which drafters' traces a folder holds, once all of them are recorded.

    Args:
        places: folder of each drafter's trace, by the drafter's name.
    """
    write_bytes(folder / CONTENTS, msgspec.json.format(msgspec.json.encode(Contents(VERSION, places)), indent=1))
