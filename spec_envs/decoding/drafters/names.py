"""Parse the names of drafters, and list the drafters of models.yml."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from spec_envs.checked import nearest
from spec_envs.decoding.drafters.formats import kind_of_folder
from spec_envs.decoding.exits.files import is_exit
from spec_envs.decoding.weights.assets import described_in, is_own, own_folder
from spec_envs.decoding.weights.checkpoints import model_folder, registry

LOOKUP: Final = "lookup"  # copies without weights; before another's name and a plus sign it is tried first
SUFFIX: Final = "suffix"  # the same, by suffix decoding
STREAM = "@stream"  # after suffix: it drafts from earlier answers, too
EXIT = "exit:"  # before a number of layers, an untrained exit of the target after these
Kind = Literal["none", "exit", "eagle3", "parallel", "dflash", "model"]
BLOCKS: tuple[Kind, ...] = ("parallel", "dflash")  # they draft several tokens with one forward
HEADS: tuple[Kind, ...] = ("eagle3", *BLOCKS)  # they read states of the target, and draft trees
CopyKind = Literal["", "lookup", "suffix"]
ShortlistSize = int | Literal["auto", "all"]
SIZED = re.compile(r"(.*)@(\d+|all)")  # the name of a draft model with the size of its shortlist


@dataclass(frozen=True)
class DrafterName:
    """The name of a drafter, taken apart.

    Attributes:
        copies: what copies from the text where it repeats itself, before the model is asked: ``"lookup"`` is prompt
            lookup, ``"suffix"`` is suffix decoding, ``""`` is nothing.
        model: what drafts elsewhere: a name of models.yml, a folder, a hub id, a GGUF file, ``exit:N`` or the folder of
            a trained exit; ``""`` where nothing but copies is drafted.
        stream: True if suffix decoding drafts from the answers before in the same stream, too.
        shortlist: from how many tokens a draft model drafts, besides those of the text: a number, ``"all"``, or
            ``"auto"`` (see ``shortlist.size_of``).
    """

    copies: CopyKind
    model: str
    shortlist: ShortlistSize = "auto"
    stream: bool = False

    @classmethod
    def parse(cls, name: str) -> DrafterName:
        """Parse a name: ``lookup``, ``suffix`` or ``suffix@stream``, one of them and a plus sign before ``MODEL``, or
        ``MODEL``, a draft model optionally with ``@N`` or ``@all``.

        Raises:
            ValueError: the name is empty; nothing, or ``lookup`` or ``suffix`` again, follows the plus sign; a shortlist
                has no tokens, or is that of a copy.
        """
        if not name:
            raise ValueError("drafter is ''; expected the name of a drafter, or None to decode plainly")
        copies, stream, model = copies_in(name)
        shortlist: ShortlistSize = "auto"
        if found := SIZED.fullmatch(model):
            model, shortlist = found[1], "all" if found[2] == "all" else int(found[2])
            if shortlist == 0:
                raise ValueError(f"drafter is {name!r}; expected a shortlist of 1 or more tokens after the @")
            if model in (LOOKUP, SUFFIX):
                raise ValueError(f"drafter is {name!r}; {model!r} has no shortlist, leave out the @")
        if copies and (copies_in(model)[0] or name.endswith("+")):
            raise ValueError(
                f"drafter is {name!r}; expected the name of a head, a draft model or an exit after the plus sign"
            )
        return cls(copies, model, shortlist, stream)

    def __str__(self) -> str:
        model = self.model if self.shortlist == "auto" else f"{self.model}@{self.shortlist}"
        return "+".join(part for part in (f"{self.copies}{STREAM * self.stream}", model) if part)

    @functools.cached_property
    def kind(self) -> Kind:
        """Kind of the model, as its folder shows; ``"none"`` where nothing but copies is drafted.

        Raises:
            ValueError: the name is not found, or is a drafter of a format that is not read.
        """
        if not self.model:
            return "none"
        if self.model.startswith(EXIT) or is_exit(self.model):
            return "exit"
        described = described_in(self.model) if is_own(self.model) else self.folder  # without fetching weights
        return kind_of_folder(described)

    @property
    def chain(self) -> bool:
        """Return whether it drafts chains only; a head drafts trees, and so does suffix decoding alone."""
        return self.kind in ("exit", "model") or (self.kind == "none" and self.copies == LOOKUP)

    @property
    def single(self) -> bool:
        """Return whether it drafts chains where several drafters share a text, as every drafter without weights
        does."""
        return self.chain or not self.model

    @property
    def folder(self) -> Path:
        """Folder of the model's weights, where it has any of its own."""
        return drafter_folder(self.model)


def copies_in(name: str) -> tuple[CopyKind, bool, str]:
    """Return what copies before a model, as a drafter's name says, whether it drafts from earlier answers, and the rest
    of the name."""
    first, _, rest = name.partition("+")
    if first == LOOKUP:
        return LOOKUP, False, rest
    if first in (SUFFIX, f"{SUFFIX}{STREAM}"):
        return SUFFIX, first != SUFFIX, rest
    return "", False, name


def drafter_folder(name: str) -> Path:
    """Return the folder of a head or a draft model, with its weights: one of this project's own, or any model that has
    a name here. It is fetched if necessary.

    Raises:
        ValueError: the name is not found, or the weights cannot be fetched.
    """
    return own_folder(name) if is_own(name) else model_folder(name, (LOOKUP, SUFFIX))


def default_drafter(target: str, chain: bool = False) -> str:
    """Return the drafter that models.yml has for a target: the first one, or the first that drafts chains.

    Raises:
        ValueError: there is none.
    """
    found = next((name for name in known_drafters(target) if not chain or DrafterName.parse(name).chain), None)
    if found is None:
        targets = list(dict.fromkeys(entry["target"] for entry in registry()["drafters"].values()))
        raise ValueError(
            f"no drafter is known for {target!r}{nearest(target, targets)}, only for {', '.join(targets)}; "
            "name one with drafter= (folder or hub id of an EAGLE-3 head or a draft model, 'lookup', or 'lookup+' and "
            "a draft model), or train one with `spec-envs drafter`"
        )
    return found


def known_drafters(target: str) -> list[str]:
    """Return the names of the drafters that models.yml has for a target, its default first; none for other targets."""
    return [name for name, entry in registry()["drafters"].items() if entry["target"] == target]


def static_over_plain(target: str, drafter: str) -> float:
    """Return the speed of a pair's best static setting in units of plain decoding; 1 where it was not measured."""
    entry = registry()["drafters"].get(drafter, {})
    return entry.get("static_over_plain", 1.0) if entry.get("target") == target else 1.0
