"""The interfaces of drafters, and the base class of those that draft chains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from spec_envs.decoding.tree import Children, Tree


class Drafter(Protocol):
    """Proposes the children of tree nodes, and keeps its own state of the committed text.

    Attributes:
        capture: layers of the target whose inputs it reads as ``features``; empty for a drafter that reads tokens only.
        vocab: size of the vocabulary of the target that it was made for.
        context: most tokens of a text.
        width: children per node, and nodes expanded per level.
    """

    capture: tuple[int, ...]
    vocab: int
    context: int
    width: int

    @property
    def drafting(self) -> str:
        """Name of the drafter whose turn it is; ``""`` where there is one only."""

    @property
    def lag(self) -> int:
        """Rows of the text that the next forward reads, because none has read them; 0 without weights of its own."""

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and begin a new one.

        Args:
            text: the prompt and the first token.
            positions: most tokens by which the text may grow.
            features: of all tokens but the last, ``[len(text) - 1, …]``.
            rng: for a drafter that samples.
        """

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append tokens to the text; ``features`` ``[len(tokens), …]`` are those of the token before each."""

    def root(self, tree: Tree) -> int:
        """Read the committed tokens that are still unread, then start the tree with the root's best children.

        Returns:
            The rows of the forward; 0 if none was needed.
        """

    def expand(self, tree: Tree) -> int:
        """Grow the tree by the best children of its frontier; return the rows of the forward, as ``root`` does."""


@runtime_checkable
class Copier(Protocol):
    """A drafter that may copy tokens from an earlier place of the text that reads like its end."""

    def matched(self) -> int:
        """Return how many of the text's last tokens match the place to copy from; 0 if there is none."""

    def source(self, chain: list[int]) -> Any:
        """Return where the token after ``chain`` would be copied from, or None where it would not be copied."""


class FreeDrafter(Drafter, Protocol):
    """A drafter without weights, which can say what it would draft, because that costs no forward."""

    def ahead(self, longest: int) -> list[int]:
        """Return the chain of up to ``longest`` tokens that would be drafted now at width 1, without drafting it."""


@runtime_checkable
class Reader(Protocol):
    """A drafter whose hidden states an agent can read, to draft in its place."""

    def look(self, chain: list[int]) -> tuple[Tensor, int]:
        """Return what its projection reads after the text and ``chain``, ``[1, hidden]``, and the rows of the
        forward."""


class ChainDrafter(ABC):
    """A drafter of chains that can always predict one more token.

    Attributes:
        top_k: draw from this many most probable tokens, with weights rounded as they are sent over a network (see
            ``Proposal.truncated``); None draws from the whole distribution.
        temperature: at which tokens are drawn; 0 drafts the most probable token.
    """

    vocab: int
    context: int
    temperature: float
    capture: tuple[int, ...] = ()
    width: int = 1
    drafting: str = ""
    top_k: int | None = None

    def root(self, tree: Tree) -> int:
        """Draft the first token of a chain."""
        children, rows = self.draft([])
        tree.start(children)
        return rows

    def expand(self, tree: Tree) -> int:
        """Draft the token after the chain, unless the chain ends here."""
        if not self.continues(tree):
            return 0
        children, rows = self.draft(tree.tokens.tolist())
        tree.grow(children)
        return rows

    @property
    def lag(self) -> int:
        """Rows of the text that the next forward reads; see ``Drafter``. The default is that of one without weights."""
        return 0

    @abstractmethod
    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and begin a new one; see ``Drafter.start``."""

    @abstractmethod
    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append tokens to the text; see ``Drafter.commit``."""

    def continues(self, tree: Tree) -> bool:
        """Return whether the chain may grow; the default always lets it."""
        return True

    @abstractmethod
    def draft(self, chain: list[int]) -> tuple[Children, int]:
        """Return the token drafted after the committed text and ``chain``, with its alternatives, and the rows of the
        forward (0 without one)."""
