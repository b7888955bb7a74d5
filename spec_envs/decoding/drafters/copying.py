"""Draft copies where the text repeats itself, and with a model elsewhere: in a chain token by token, in front of trees
cycle by cycle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from spec_envs.decoding.drafters.base import ChainDrafter, Drafter
from spec_envs.decoding.drafters.lookup import Copy, LookedUp, child
from spec_envs.decoding.drafters.portfolio import Portfolio
from spec_envs.decoding.drafters.suffix import SuffixDrafter, Suffixes
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.tree import Children, Tree

Copies = LookedUp | Suffixes


class CopyingDrafter(ChainDrafter):
    """Drafts a chain token by token, by copying or with a model.

    Where the last tokens (drafted ones included) occurred earlier in the text, the token that followed there is copied,
    which costs no forward; elsewhere the draft model drafts. When sampling, a copy is proposed with certainty, so that
    the acceptance rule stays exact.

    Args:
        model: the draft model, or an early exit.
        copies: finds what is copied.
    """

    def __init__(self, model: ChainDrafter, copies: Copies):
        self.model, self.copies = model, copies
        self.vocab, self.context = model.vocab, model.context
        self.capture, self.temperature = model.capture, model.temperature

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        self.model.start(text, positions, features, rng)
        self.copies.start(text)

    @property
    def top_k(self) -> int | None:
        """The draft model's ``top_k``; see ``ChainDrafter``."""
        return self.model.top_k

    @top_k.setter
    def top_k(self, k: int | None) -> None:
        self.model.top_k = k

    @property
    def lag(self) -> int:
        return self.model.lag

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        self.model.commit(tokens, features)
        self.copies.append(tokens)

    def matched(self) -> int:
        """Return how many of the text's last tokens match an earlier place; see ``Copier``."""
        return self.copies.matched()

    def source(self, chain: list[int]) -> Copy | None:
        """Return what would be copied after ``chain``, or None where the draft model drafts it."""
        return self.copies.find(chain)

    def continues(self, tree: Tree) -> bool:
        return self.model.continues(tree)

    def draft(self, chain: list[int]) -> tuple[Children, int]:
        """Copy the next token, or draft it with the model."""
        copy = self.source(chain)
        if copy is None:
            return self.model.draft(chain)
        return child(copy, Proposal.certain(copy.token) if self.temperature else None), 0


class CopyingTrees:
    """Drafts a chain of copies where the text repeats itself, and a head's tree everywhere else.

    A cycle whose first token can be copied drafts copies only, all that there are at once, because they cost no forward;
    the head catches up with the text when it is asked again. When sampling, a copy is the one child of its node, tested
    as the children of a head's tree are.

    Args:
        head: drafts trees.
        copies: finds what is copied.

    Attributes:
        copied: True if the tree under way is a chain of copies.
    """

    drafting = ""

    def __init__(self, head: Drafter, copies: Copies):
        self.head, self.copies = head, copies
        self.capture, self.vocab, self.context, self.width = head.capture, head.vocab, head.context, head.width
        self.copied = False

    @property
    def lag(self) -> int:
        """The head's ``lag``; see ``Drafter``."""
        return self.head.lag

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and begin a new one; see ``Drafter.start``."""
        self.head.start(text, positions, features, rng)
        self.copies.start(text)

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append tokens to the text; see ``Drafter.commit``."""
        self.head.commit(tokens, features)
        self.copies.append(tokens)

    def root(self, tree: Tree) -> int:
        """Draft a whole chain of copies, which takes no forward, or start the head's tree; return the rows."""
        copy_all(self.copies, tree)
        self.copied = tree.size > 0
        return 0 if self.copied else self.head.root(tree)

    def expand(self, tree: Tree) -> int:
        """Grow the head's tree and return the rows; a chain of copies does not grow."""
        return 0 if self.copied else self.head.expand(tree)

    def matched(self) -> int:
        """Return how many of the text's last tokens match an earlier place; see ``Copier``."""
        return self.copies.matched()

    def source(self, chain: list[int]) -> Copy | None:
        """Return what would be copied if nothing is drafted yet; None within a cycle, in which nothing more is."""
        return None if chain else self.copies.find(chain)


def copy_all(copies: Copies, tree: Tree) -> None:
    """Clear the tree and grow a chain of copies, as far as there are any and the tree has levels."""
    tree.clear()
    while tree.size <= tree.max_depth and (copy := copies.find(tree.tokens.tolist())) is not None:
        (tree.grow if tree.size else tree.start)(child(copy))


def remembers(drafter: Drafter | None) -> bool:
    """Return whether a drafter, or one of several, drafts from earlier answers, too."""
    if isinstance(drafter, Portfolio):
        return any(map(remembers, drafter.drafters))
    copies = drafter.copies if isinstance(drafter, CopyingDrafter | CopyingTrees) else drafter
    copies = copies.seen if isinstance(copies, SuffixDrafter) else copies
    return isinstance(copies, Suffixes) and copies.remembered > 0
