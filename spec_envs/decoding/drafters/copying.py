"""Copying drafter: prompt lookup where the text repeats itself, a draft model everywhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.drafters.lookup import Occurrence, Occurrences, copy
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.tree import Children, Tree

SHORTEST, NGRAM = 2, 4  # matching tokens: at least, and looked up at once


class CopyingDrafter(ChainDrafter):
    """Drafts a chain token by token: where the last tokens, drafted ones included, stood in the text before, the one that
    followed there is copied, which costs nothing; elsewhere the draft model drafts.

    When sampling, a copy's proposal is all on that one token, so that the acceptance rule stays exact.

    Args:
        model: the draft model, or an early exit.
    """

    found: Occurrence | None  # where the next token would be copied from,
    found_behind: int  # behind a chain of this length; below 0 nothing was looked up yet

    def __init__(self, model: ChainDrafter):
        self.model, self.vocab, self.context = model, model.vocab, model.context
        self.capture, self.temperature = model.capture, model.temperature

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and take this one."""
        self.model.start(text, positions, features, rng)
        self.seen = Occurrences(text, NGRAM)
        self._forget()

    @property
    def top_k(self) -> int | None:
        """Of what the draft model draws from; see ``ChainDrafter``."""
        return self.model.top_k

    @top_k.setter
    def top_k(self, k: int | None) -> None:
        self.model.top_k = k

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append tokens to the text."""
        self.model.commit(tokens, features)
        self.seen.append(tokens)
        self._forget()

    def matched(self) -> int:
        """See ``Copier``."""
        found = self.seen.find()
        return found.matched if found else 0

    def source(self, chain: list[int]) -> Occurrence | None:
        """Where the token behind a chain would be copied from; None where the draft model would be asked."""
        if self.found_behind != len(chain):
            found = self.seen.find(chain)
            self.found = found if found and found.matched >= SHORTEST else None
            self.found_behind = len(chain)
        return self.found

    def goes_on(self, tree: Tree) -> bool:
        """See ``ChainDrafter``: as the model says."""
        return self.model.goes_on(tree)

    def draft(self, chain: list[int]) -> tuple[Children, int]:
        """Copy the next token, or have the model draft it."""
        source = self.source(chain)
        if source is None:
            return self.model.draft(chain)
        token = self.seen.text[source.next]
        self.found = self.seen.behind(source)
        if self.found:  # the copy goes on from there
            self.found_behind = len(chain) + 1
        return copy(token, source.matched, Proposal.certain(token) if self.temperature else None), 0

    def _forget(self) -> None:
        """The next chain is another one."""
        self.found, self.found_behind = None, -1
