"""Copying drafter: prompt lookup where the text repeats itself, a draft model everywhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.drafters.lookup import Occurrence, Occurrences, copy
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.tree import Children, Tree

SHORTEST, NGRAM = 2, 4  # fewest matching tokens of a copy, and most that are looked up at once


class CopyingDrafter(ChainDrafter):
    """Drafts a chain token by token, by copying or with a model.

    Where the last tokens (drafted ones included) occurred earlier in the text, the token that followed there is copied,
    which costs no forward; elsewhere the draft model drafts. When sampling, a copy is proposed with certainty, so that
    the acceptance rule stays exact.

    Args:
        model: the draft model, or an early exit.

    Attributes:
        found: the earlier place that the token after a chain of ``found_after`` tokens is copied from; None if the
            model drafts it.
        found_after: length of the chain that was last looked up; −1 if none was.
    """

    found: Occurrence | None
    found_after: int

    def __init__(self, model: ChainDrafter):
        self.model, self.vocab, self.context = model, model.vocab, model.context
        self.capture, self.temperature = model.capture, model.temperature

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        self.model.start(text, positions, features, rng)
        self.seen = Occurrences(text, NGRAM)
        self._forget()

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
        self.seen.append(tokens)
        self._forget()

    def matched(self) -> int:
        """Return how many of the text's last tokens match an earlier place; see ``Copier``."""
        found = self.seen.find()
        return found.matched if found else 0

    def source(self, chain: list[int]) -> Occurrence | None:
        """Return where the token after ``chain`` would be copied from, or None where the draft model drafts it."""
        if self.found_after != len(chain):
            found = self.seen.find(chain)
            self.found = found if found and found.matched >= SHORTEST else None
            self.found_after = len(chain)
        return self.found

    def continues(self, tree: Tree) -> bool:
        return self.model.continues(tree)

    def draft(self, chain: list[int]) -> tuple[Children, int]:
        """Copy the next token, or draft it with the model."""
        source = self.source(chain)
        if source is None:
            return self.model.draft(chain)
        token = self.seen.text[source.next]
        self.found = self.seen.after(source)
        if self.found:  # the copy continues from there
            self.found_after = len(chain) + 1
        return copy(token, source.matched, Proposal.certain(token) if self.temperature else None), 0

    def _forget(self) -> None:
        """Forget where the last chain copied from."""
        self.found, self.found_after = None, -1
