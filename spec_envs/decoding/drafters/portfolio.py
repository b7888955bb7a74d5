"""Portfolio: several drafters read one text, and one of them drafts each cycle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from torch import Tensor

from spec_envs.decoding.drafters.base import Copier, Drafter, FreeDrafter
from spec_envs.decoding.drafters.names import LOOKUP, SUFFIX, DrafterName
from spec_envs.decoding.tree import Tree
from spec_envs.decoding.weights.checkpoints import registry

SEPARATOR = ","  # between the names of the drafters of a portfolio


def is_portfolio(drafter: str) -> bool:
    """Return True for the names of several drafters, joined by commas."""
    return SEPARATOR in drafter


def members(drafter: str) -> tuple[DrafterName, ...]:
    """Return the drafters of a portfolio.

    Args:
        drafter: their names, joined by commas.

    Raises:
        ValueError: there is one only, a name is empty, or one is there twice.
    """
    parts = [part.strip() for part in drafter.split(SEPARATOR)]
    if len(parts) < 2 or "" in parts:
        raise ValueError(f"drafter is {drafter!r}; expected two or more names of drafters, joined by commas")
    names = tuple(map(DrafterName.parse, parts))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"drafter is {drafter!r}; {str(twice)!r} is there twice, name it once")
    return names


def default_members(target: str) -> str:
    """Return the default portfolio of a target: prompt lookup, suffix decoding, and every drafter of its own in
    models.yml that nothing copies for.

    Raises:
        ValueError: models.yml has none.
    """
    entries = registry()["drafters"]
    bare = [name for name, entry in entries.items() if entry["target"] == target and not DrafterName.parse(name).copies]
    if not bare:
        raise ValueError(
            f"no drafters are known for {target!r}; name them with drafter=, joined by commas, such as "
            "'lookup,FOLDER' for prompt lookup and a folder of an EAGLE-3 head or a draft model"
        )
    return SEPARATOR.join([LOOKUP, SUFFIX, *bare])


class Portfolio:
    """Several drafters over one text; the one that was chosen drafts. The others note what joins the text, and read it
    in their next forward, whose rows are charged as those of any other.

    Args:
        names, drafters: the drafters and what they are called; those of chains are loaded with width 1.
        width: children per node of the trees, and nodes expanded per level; that of the decoder's tree.

    Attributes:
        capture: layers of the target whose inputs any of the drafters reads.
        chosen: number of the drafter that drafts; None if nobody does, and a cycle is a step of plain decoding.
        free: numbers of the drafters that have no weights, so that asking them costs no forward.
        copiers: the drafters that may copy.

    Raises:
        ValueError: the drafters are for targets of different vocabularies.
    """

    def __init__(self, names: Sequence[DrafterName], drafters: Sequence[Drafter], width: int):
        self.names, self.drafters, self.width = tuple(map(str, names)), tuple(drafters), width
        sizes = {drafter.vocab for drafter in drafters}
        if len(sizes) > 1:
            raise ValueError(
                f"the drafters {', '.join(self.names)} have vocabularies of {sorted(sizes)} ids; expected one"
            )
        self.vocab, self.context = sizes.pop(), min(drafter.context for drafter in drafters)
        self.capture = tuple(sorted({layer for drafter in drafters for layer in drafter.capture}))
        self.places = [[self.capture.index(layer) for layer in drafter.capture] for drafter in drafters]
        self.free = [i for i, name in enumerate(names) if not name.model]
        self.copiers = [cast(Copier, drafter) for name, drafter in zip(names, drafters, strict=True) if name.copies]
        self.chosen: int | None = None

    def choose(self, drafter: int | None) -> None:
        """Let a drafter, by its number, draft the next cycle; None lets nobody."""
        self.chosen = drafter

    def draws_trees(self, drafter: int) -> bool:
        """Return True for a drafter of trees, False for one of chains."""
        return self.drafters[drafter].width > 1

    @property
    def drafting(self) -> str:
        """Name of the drafter that was chosen."""
        return "" if self.chosen is None else self.names[self.chosen]

    @property
    def lag(self) -> int:
        """Rows that the drafter which was chosen reads before it drafts; see ``Drafter``."""
        return 0 if self.chosen is None else self.drafters[self.chosen].lag

    @property
    def lags(self) -> list[int]:
        """Rows that each of the drafters would read before it drafts."""
        return [drafter.lag for drafter in self.drafters]

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Let every drafter read a new text; nobody is chosen."""
        self.chosen = None
        for drafter, places in zip(self.drafters, self.places, strict=True):
            drafter.start(text, positions, self._read_by(places, features), rng)

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Let every drafter note tokens that joined the text."""
        for drafter, places in zip(self.drafters, self.places, strict=True):
            drafter.commit(tokens, self._read_by(places, features))

    def root(self, tree: Tree) -> int:
        """Let the drafter that was chosen start the tree; return the rows of its forward."""
        if self.chosen is None:
            tree.clear()
            return 0
        return self.drafters[self.chosen].root(tree)

    def expand(self, tree: Tree) -> int:
        """Let the drafter that was chosen grow the tree; return the rows of its forward."""
        return 0 if self.chosen is None else self.drafters[self.chosen].expand(tree)

    def ahead(self, drafter: int, longest: int) -> list[int]:
        """Return the chain that a drafter without weights would draft now.

        Args:
            drafter: one of ``free``.
            longest: most tokens of the chain.
        """
        return cast(FreeDrafter, self.drafters[drafter]).ahead(longest)

    def _read_by(self, places: list[int], features: Tensor) -> Tensor:
        """Return the features that a drafter reads, which are at these places among those captured."""
        if len(places) == len(self.capture):
            return features
        if not places:
            return features[:, :0]
        states = features.unflatten(-1, (len(self.capture), -1))
        own: Tensor = states[:, places].flatten(1)
        return own
