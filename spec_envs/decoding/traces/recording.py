"""The interface of everything that ``trace=`` may name: decoding that was recorded or made up, and needs no models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from spec_envs.decoding.clock import CostTable, WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.loading import DEFAULT_TARGET
from spec_envs.prompts.rows import SPLITS

MAX_NEW_TOKENS = 128  # default length of a text
EVERY = "all"  # name of all splits but the final one, or of all prompt sets
DEFAULTS: dict[str, Any] = {  # keyword arguments about models and prompts, with their defaults
    "target": DEFAULT_TARGET,
    "drafter": "auto",
    "device": "auto",
    "dtype": "auto",
    "data_dir": None,
    "template": None,
    "date": None,
    "temperature": None,
    "top_p": 1.0,
}


class Problem(Protocol):
    """The properties of a control that a recording for it depends on."""

    @property
    def env_id(self) -> str: ...
    @property
    def trace_kind(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def max_depth(self) -> int: ...
    @property
    def drafters(self) -> tuple[str, ...]: ...
    @property
    def depths(self) -> tuple[int, ...]: ...


class RecordedText(Protocol):
    """A text of a recording. Its split is a name of ``prompts.rows.Split``, or ``EVERY`` for a text of all splits."""

    @property
    def task(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def prompt(self) -> list[int]: ...


class Recording(ABC):
    """Decoding that needs no models: an exact trace, a synthetic profile, or an expected-acceptance trace.

    Attributes:
        name: name of the recording for error messages.
        static_over_plain: speed of its best static setting in units of plain decoding; 1 where that was not measured.
        max_new_tokens: most tokens of a text by default.
    """

    name: str
    static_over_plain: float
    max_new_tokens = MAX_NEW_TOKENS

    @abstractmethod
    def costs(self) -> CostTable:
        """Return the cost table that prices its forwards by default."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments of an environment that it was made with."""

    @abstractmethod
    def prompts(self, split: str, names: str = EVERY) -> list[tuple[str, list[int]]]:
        """Return the task and the ids of every prompt of a split and of prompt sets; see ``chosen``.

        Raises:
            ValueError: there are none.
        """

    @abstractmethod
    def check(self, problem: Problem, max_new_tokens: int | None = None) -> None:
        """Refuse a control that the recording does not fit, and texts longer than it has.

        Raises:
            ValueError: the message names what does not fit.
        """

    @abstractmethod
    def decoder(self, problem: Problem, clock: WallClock) -> Decoder:
        """Return a decoder that replays it under a control.

        Raises:
            ValueError: the recording does not fit the control (``check``).
        """

    def check_settings(self, given: Mapping[str, Any]) -> None:
        """Refuse settings of models and prompts that would have no effect, because the recording replaces both.

        Args:
            given: keyword arguments of an environment or of ``load_decoder``. Defaults are allowed, and the values that
                the recording was made with.

        Raises:
            ValueError: any other value.
        """
        made = {"device": "cpu", "temperature": 0.0} | self.settings()
        for name, default in DEFAULTS.items():
            value = given.get(name, default)
            if value in (default, made.get(name, default)):
                continue
            if name in made:
                raise ValueError(f"the trace {self.name!r} was recorded with {name} {made[name]!r}, not {value!r}")
            raise ValueError(
                f"{name} is {value!r}, which has no effect while the trace {self.name!r} is replayed; leave it out"
            )


def chosen(recording: str, texts: Sequence[RecordedText], split: str, names: str) -> list[int]:
    """Return the indices of the texts of a split and of prompt sets.

    Args:
        recording: its name, for error messages.
        split: ``"train"``, ``"validation"``, ``"test"``, ``"final"``, or ``"all"`` of them but the final one.
        names: prompt sets, or kinds of text of a profile, separated by commas; ``"all"`` is every one.

    Raises:
        ValueError: the recording has no such text.
    """
    tasks = tasks_named(names, {text.task for text in texts}, recording)
    splits = {split, EVERY} | (set(SPLITS) if split == EVERY else set())
    found = [i for i, text in enumerate(texts) if text.split in splits and text.task in tasks]
    if not found:
        raise ValueError(f"the trace {recording!r} has no texts of the prompts {names!r} in the split {split!r}")
    return found


def tasks_named(names: str, tasks: Collection[str], recording: str) -> set[str]:
    """Return the tasks of a recording that ``names``, separated by commas, selects; ``"all"`` is every one.

    Raises:
        ValueError: the recording does not have a task of that name.
    """
    asked = {name.strip() for name in names.split(",")}
    if unknown := sorted(asked - {EVERY, *tasks}):
        raise ValueError(
            f"the trace {recording!r} has no texts of the prompts {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(sorted(tasks))}"
        )
    return set(tasks) if EVERY in asked else asked
