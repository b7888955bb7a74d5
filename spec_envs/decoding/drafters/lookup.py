"""Prompt lookup: what followed the last time that the text ended like this is drafted; no weights (Saxena 2023,
`prompt-lookup-decoding`; Yang et al. 2023, arXiv 2304.04487)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.tree import Children, Tree

LONGEST = 16  # most matching tokens that are counted


class Occurrence(NamedTuple):
    """An earlier place that reads like the text's end: the index of the token behind it, and how many tokens match."""

    next: int
    matched: int


class Occurrences:
    """Where every run of up to ``ngram`` tokens of a text ended last.

    Args:
        text: what it begins with.
        ngram: most tokens that are looked up.
        longest: most tokens that are compared, to tell how far a match reaches back.
    """

    def __init__(self, text: Sequence[int], ngram: int, longest: int = LONGEST):
        self.text: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}
        self.ngram, self.longest = ngram, max(ngram, longest)
        self.append(text)

    def append(self, tokens: Sequence[int]) -> None:
        """Tokens that the text goes on with; a run is noted when something stands behind it."""
        for token in tokens:
            for n in range(1, min(self.ngram, len(self.text)) + 1):
                self.ends[tuple(self.text[-n:])] = len(self.text)
            self.text.append(token)

    def find(self, chain: Sequence[int] = ()) -> Occurrence | None:
        """The latest earlier place that reads like the end of the text with a chain behind it: of those that match in
        the most tokens, up to ``ngram``."""
        tail = [*self.text[-self.longest :], *chain][-self.longest :]
        for n in range(min(self.ngram, len(tail)), 0, -1):
            end = self.ends.get(tuple(tail[-n:]))
            if end is not None:
                while n < min(len(tail), end) and self.text[end - 1 - n] == tail[-1 - n]:
                    n += 1
                return Occurrence(end, n)
        return None

    def behind(self, source: Occurrence) -> Occurrence | None:
        """Where the next token is copied from; None at the end of the text."""
        return Occurrence(source.next + 1, source.matched + 1) if source.next + 1 < len(self.text) else None


def copied_right(matched: int) -> float:
    """How probable it is that a token is right that is copied from behind so many matching ones.

    A fit to answers of smollm2-135m: half behind two matching tokens, two thirds behind three, nine tenths behind eight.
    """
    return 1 / (1 + (2 / min(matched, LONGEST)) ** 1.5)


def copy(token: int, matched: int, proposal: Proposal | None = None) -> Children:
    """A copied token as what a drafter proposes, as probable as such copies are right."""
    p = copied_right(matched)
    entropy = -p * np.log(p) - (1 - p) * np.log1p(-p)
    return Children(np.array([[token]]), np.log([[p]]), np.array([entropy]), proposal)


class LookupDrafter:
    """Drafts the continuation of the latest earlier occurrence of the text's last tokens, the longest that occurs.

    Where none does, the tree stays empty, and a cycle is one of plain decoding.

    Args:
        vocab, context: of the target.
        ngram: most tokens that have to match; the last one alone is tried last.
    """

    capture: tuple[int, ...] = ()
    width = 1

    def __init__(self, vocab: int, context: int, ngram: int = 3):
        self.vocab, self.context, self.ngram = vocab, context, ngram
        self.copying: Occurrence | None = None  # where the token behind the chain would be copied from

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and take this one."""
        self.seen = Occurrences(text, self.ngram)

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append tokens to the text."""
        self.seen.append(tokens)

    def root(self, tree: Tree) -> int:
        """Find the earlier occurrence, and draft the token behind it."""
        tree.clear()
        self.copying = self.seen.find()
        if self.copying:
            tree.start(self._child(self.copying))
        return 0

    def expand(self, tree: Tree) -> int:
        """Draft the token behind the last one, as far as the text goes."""
        if tree.size and self.copying:
            tree.grow(self._child(self.copying))
        return 0

    def matched(self) -> int:
        """See ``Copier``."""
        found = self.seen.find()
        return found.matched if found else 0

    def source(self, chain: list[int]) -> Occurrence | None:
        """Where the token behind a chain would be copied from."""
        return self.copying if chain else self.seen.find()

    def _child(self, source: Occurrence) -> Children:
        self.copying = self.seen.behind(source)
        return copy(self.seen.text[source.next], source.matched)
