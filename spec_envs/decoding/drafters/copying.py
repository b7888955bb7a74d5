"""Copying drafter: prompt lookup where the text repeats itself, a draft model everywhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.drafters.lookup import LONGEST, Occurrence, Occurrences, copy
from spec_envs.decoding.tree import Children, Tree

SHORTEST, NGRAM = 2, 4  # matching tokens: at least, and looked up at once


class CopyingDrafter:
    """Drafts a chain token by token: where the last tokens, drafted ones included, stood in the text before, the one that
    followed there is copied, which costs nothing; elsewhere the draft model drafts.

    When sampling, a copy's proposal is all on
    that one token, so that the acceptance rule stays exact.

    Args:
        model: the draft model.
    """

    capture: tuple[int, ...] = ()
    width = 1

    def __init__(self, model: DraftModelDrafter):
        self.model, self.vocab, self.context = model, model.vocab, model.context
        self.copying: Occurrence | None = None  # where the chain's last token was copied from, while that goes on

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and take this one."""
        self.model.start(text, positions, features, rng)
        self.seen, self.copying = Occurrences(text, NGRAM, LONGEST), None

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append tokens to the text."""
        self.model.commit(tokens, features)
        self.seen.append(tokens)
        self.copying = None

    def root(self, tree: Tree) -> int:
        """Draft the first token of a chain."""
        children, rows = self._child([])
        tree.start(children)
        return rows

    def expand(self, tree: Tree) -> int:
        """Draft the token behind the chain."""
        children, rows = self._child(tree.tokens.tolist())
        tree.grow(children)
        return rows

    def source(self, chain: list[int]) -> Occurrence | None:
        """Where the token behind a chain would be copied from; None where the draft model would be asked."""
        found = self.copying or self.seen.find(chain)
        return found if found and found.matched >= SHORTEST else None

    def _child(self, chain: list[int]) -> tuple[Children, int]:
        source = self.source(chain)
        if source is None:
            return self.model.draft(chain)
        token, proposal = self.seen.text[source.next], None
        self.copying = self.seen.behind(source)
        if self.model.temperature:
            proposal = np.zeros(self.vocab)
            proposal[token] = 1.0
        return copy(token, source.matched, proposal), 0
