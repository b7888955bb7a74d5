"""Copying drafter: prompt lookup where the text repeats itself, a draft model everywhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.drafters.lookup import Occurrence, Occurrences
from spec_envs.decoding.tree import Children, Tree

SHORTEST, NGRAM, LONGEST = 2, 4, 16  # matching tokens: at least, looked up at once, and most that are counted


class CopyingDrafter:
    """Drafts a chain token by token: where the last tokens, drafted ones included, stood in the text before, the one that
    followed there is copied, which costs nothing; elsewhere the draft model drafts.

    A copied token counts as probable as such copies are right (``copied_right``). When sampling, its proposal is all on
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
        token = self.seen.text[source.next]
        more = Occurrence(source.next + 1, source.matched + 1)
        self.copying = more if more.next < len(self.seen.text) else None
        p = copied_right(source.matched)
        entropy = -p * np.log(p) - (1 - p) * np.log1p(-p)
        proposal = None
        if self.model.temperature:
            proposal = np.zeros(self.vocab)
            proposal[token] = 1.0
        return Children(np.array([[token]]), np.log([[p]]), np.array([entropy]), proposal), 0


def copied_right(matched: int) -> float:
    """How probable it is that a token is right that is copied from behind so many matching ones.

    A fit: of the shipped training prompts as smollm2-135m answers them, half of the copies behind two matching tokens
    are right, two thirds behind three, nine tenths behind eight.
    """
    return 1 / (1 + (2 / min(matched, LONGEST)) ** 1.5)
