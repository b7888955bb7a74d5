"""What a drafter offers the decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from spec_envs.decoding.tree import Children, Tree


class Drafter(Protocol):
    """Proposes the children of tree nodes; keeps a cache of the committed text of its own.

    Attributes:
        capture: layers of the target whose inputs ``features`` it reads; empty for a drafter that needs ids only.
        vocab: size of the target vocabulary it was made for.
        context: most tokens of a text.
        width: children per node and nodes expanded per level.
    """

    capture: tuple[int, ...]
    vocab: int
    context: int
    width: int

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """A new text (prompt and first token) that may grow by ``positions``.

        ``features`` ``[len(text) - 1, …]`` belong to its tokens but the last; ``rng`` is for a drafter that draws.
        """

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Tokens added to the text, and the features of the tokens in front of them, ``[len(tokens), …]``."""

    def root(self, tree: Tree) -> int:
        """Catch up with the text, then start the tree with the root's best children.

        Returns:
            Rows that this was a forward of; 0 where none was needed.
        """

    def expand(self, tree: Tree) -> int:
        """Grow the tree by the best children of its frontier; the rows of the forward, as above."""


@runtime_checkable
class Copier(Protocol):
    """A drafter that may copy from where the text read like this before."""

    def matched(self) -> int:
        """How many of the text's last tokens match the place that would be copied from; 0 where there is none."""

    def source(self, chain: list[int]) -> Any:
        """Where the token behind a chain would be copied from; None where it would not be."""


@runtime_checkable
class Reader(Protocol):
    """A drafter that shows what it reads, to an agent that drafts in its place."""

    def look(self, chain: list[int]) -> tuple[Tensor, int]:
        """What its projection reads behind the text and a chain, ``[1, hidden]``, and the rows of the forward."""


class ChainDrafter(ABC):
    """What drafters of chains that can always say one more token have in common.

    Attributes:
        top_k: how many of the most probable tokens a drawn one is among, their weights rounded as they are sent over a
            network (see ``Proposal.truncated``); None draws from the whole distribution.
        temperature: at which it draws; 0 drafts the most probable token.
    """

    vocab: int
    context: int
    temperature: float
    capture: tuple[int, ...] = ()
    width: int = 1
    top_k: int | None = None

    def root(self, tree: Tree) -> int:
        """Draft the first token of a chain."""
        children, rows = self.draft([])
        tree.start(children)
        return rows

    def expand(self, tree: Tree) -> int:
        """Draft the token behind the chain, if anything more is."""
        if not self.goes_on(tree):
            return 0
        children, rows = self.draft(tree.tokens.tolist())
        tree.grow(children)
        return rows

    @abstractmethod
    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """See ``Drafter``."""

    @abstractmethod
    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """See ``Drafter``."""

    def goes_on(self, tree: Tree) -> bool:
        """Whether anything more is drafted behind a chain."""
        return True

    @abstractmethod
    def draft(self, chain: list[int]) -> tuple[Children, int]:
        """The token behind the committed text and a chain of drafted ones, and the rows of the forward (0 without)."""
