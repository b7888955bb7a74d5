"""Prompt lookup: draft what followed the last earlier occurrence of the text's end, without any weights (Saxena 2023,
`prompt-lookup-decoding`; Yang et al. 2023, arXiv 2304.04487)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.tree import Children, Tree

LONGEST = 16  # most matching tokens that are counted by default
SHORTEST, NGRAM = 2, 4  # fewest matching tokens of a copy before a model is asked, and most that are looked up at once


class Copy(NamedTuple):
    """A token that would be copied, how many tokens before it match, and the estimated probability that it is right."""

    token: int
    matched: int
    probability: float


class Occurrence(NamedTuple):
    """An earlier place that reads like the text's end: the index of the token after it, and how many tokens match."""

    next: int
    matched: int


class Occurrences:
    """An index of the last place where each run of up to ``ngram`` tokens of a text ended.

    Args:
        text: the first tokens of the text.
        ngram: most tokens that are looked up.
        longest: most tokens that are compared to measure how far a match reaches back.
    """

    def __init__(self, text: Sequence[int], ngram: int, longest: int = LONGEST):
        self.text: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}
        self.ngram, self.longest = ngram, max(ngram, longest)
        self.append(text)

    def append(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text; a run is indexed once a token follows it."""
        for token in tokens:
            for n in range(1, min(self.ngram, len(self.text)) + 1):
                self.ends[tuple(self.text[-n:])] = len(self.text)
            self.text.append(token)

    def find(self, chain: Sequence[int] = ()) -> Occurrence | None:
        """Return the latest earlier place that matches the end of the text and ``chain`` in the most tokens, up to
        ``ngram``; None if there is none."""
        tail = [*self.text[-self.longest :], *chain][-self.longest :]
        for n in range(min(self.ngram, len(tail)), 0, -1):
            end = self.ends.get(tuple(tail[-n:]))
            if end is not None:
                while n < min(len(tail), end) and self.text[end - 1 - n] == tail[-1 - n]:
                    n += 1
                return Occurrence(end, n)
        return None

    def after(self, source: Occurrence) -> Occurrence | None:
        """Return where the token after that of ``source`` is copied from; None at the end of the text."""
        return Occurrence(source.next + 1, source.matched + 1) if source.next + 1 < len(self.text) else None


def copy_probability(matched: int) -> float:
    """Return the estimated probability that a token copied after ``matched`` matching ones is right.

    The formula was fitted to answers of smollm2-135m: 1/2 after two matching tokens, 2/3 after three, 9/10 after eight.
    """
    return float(1 / (1 + (2 / min(matched, LONGEST)) ** 1.5))


def child(copy: Copy, proposal: Proposal | None = None) -> Children:
    """Return a copied token as the one child of a node, with the estimated probability that it is right."""
    p = copy.probability
    entropy = -p * np.log(p) - (1 - p) * np.log1p(-p)
    return Children(np.array([[copy.token]]), np.log([[p]], dtype=np.float32), np.array([entropy]), proposal)


class LookedUp:
    """Copies from the latest place that reads like the end of the text, and goes on from there.

    Attributes:
        found: the place that the token after a chain of ``found_after`` tokens is copied from; None if there is none.
        found_after: length of the chain that was last looked up; −1 if none was.
    """

    found: Occurrence | None
    found_after: int

    def anew(self) -> LookedUp:
        """Return another that has read nothing."""
        return LookedUp()

    def start(self, text: Sequence[int]) -> None:
        """Forget the last text and index this one."""
        self.seen = Occurrences(text, NGRAM)
        self.found, self.found_after = None, -1

    def append(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        self.seen.append(tokens)
        self.found, self.found_after = None, -1

    def matched(self) -> int:
        """Return how many of the text's last tokens match an earlier place; see ``Copier``."""
        found = self.seen.find()
        return found.matched if found else 0

    def find(self, chain: Sequence[int]) -> Copy | None:
        """Return the token that is copied after the text and ``chain``; None if too few tokens match."""
        if self.found_after != len(chain):
            follows = self.found and self.found_after == len(chain) - 1  # the last token of the chain was copied
            source = (self.seen.after(self.found) if self.found and follows else None) or self.seen.find(chain)
            self.found = source if source and source.matched >= SHORTEST else None
            self.found_after = len(chain)
        if self.found is None:
            return None
        return Copy(self.seen.text[self.found.next], self.found.matched, copy_probability(self.found.matched))


class LookupDrafter:
    """Drafts the continuation of the latest place where the longest run of the text's last tokens occurred before.

    Where none occurred, the tree stays empty and the cycle is a step of plain decoding.

    Args:
        vocab, context: of the target.
        ngram: longest run that is looked up; shorter ones follow, down to the last token alone.
    """

    capture: tuple[int, ...] = ()
    width, lag, drafting = 1, 0, ""

    def __init__(self, vocab: int, context: int, ngram: int = 3):
        self.vocab, self.context, self.ngram = vocab, context, ngram
        self.copying: Occurrence | None = None  # where the token after the chain would be copied from

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and index this one."""
        self.seen = Occurrences(text, self.ngram)

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append tokens to the text."""
        self.seen.append(tokens)

    def root(self, tree: Tree) -> int:
        """Find the earlier occurrence and draft the token after it; return 0, for there is no forward."""
        tree.clear()
        self.copying = self.seen.find()
        if self.copying:
            tree.start(self._child(self.copying))
        return 0

    def expand(self, tree: Tree) -> int:
        """Draft the token after the last one copied, if the text has one; return 0, since no forward runs."""
        if tree.size and self.copying:
            tree.grow(self._child(self.copying))
        return 0

    def matched(self) -> int:
        """Return how many of the text's last tokens match an earlier place; see ``Copier``."""
        found = self.seen.find()
        return found.matched if found else 0

    def source(self, chain: list[int]) -> Occurrence | None:
        """Return where the token after ``chain`` would be copied from, or None."""
        return self.copying if chain else self.seen.find()

    def ahead(self, longest: int) -> list[int]:
        """Return the chain of up to ``longest`` tokens that would be drafted now; see ``FreeDrafter``."""
        source, chain = self.seen.find(), list[int]()
        while source and len(chain) < longest:
            chain.append(self.seen.text[source.next])
            source = self.seen.after(source)
        return chain

    def _child(self, source: Occurrence) -> Children:
        self.copying = self.seen.after(source)
        return child(Copy(self.seen.text[source.next], source.matched, copy_probability(source.matched)))
