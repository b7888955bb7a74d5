"""Draft the chains of many positions of a text in one forward per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.drafters.copying import CopyingDrafter
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.drafters.lookup import LookupDrafter
from spec_envs.decoding.drafters.vocabulary import TOGETHER, same_vocabulary
from spec_envs.decoding.tree import Children, Tree

Chains = DraftModelDrafter | CopyingDrafter | LookupDrafter
NOTHING = torch.empty(0)  # features of the target, which no drafter of chains reads


class Told(ChainDrafter):
    """Stands for a draft model whose forwards are made for many chains at once: it drafts what it was told."""

    def __init__(self, model: DraftModelDrafter):
        self.vocab, self.context, self.temperature = model.vocab, model.context, model.temperature
        self.following: Children

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Nothing is kept."""

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Nothing is kept."""

    def draft(self, chain: list[int]) -> tuple[Children, int]:
        """What follows, as it was told."""
        return self.following, 1


@dataclass
class Chain:
    """What is drafted behind a position.

    Attributes:
        matched: tokens that match the place where the text read like this before, 0 without one.
        copied: of each drafted token whether it was copied from there.
    """

    drafter: Told | CopyingDrafter | LookupDrafter
    told: Told | None
    tree: Tree
    matched: int = 0
    copied: list[bool] = field(default_factory=list)

    def grow(self) -> bool:
        """Draft a token, the draft model's being told; False where nothing more is drafted."""
        size, copier = self.tree.size, None if isinstance(self.drafter, Told) else self.drafter
        if copier and not size:
            self.matched = copier.matched()
        copies = copier is not None and copier.source(self.tree.tokens.tolist()) is not None
        (self.drafter.expand if size else self.drafter.root)(self.tree)
        if self.tree.size == size:
            return False
        self.copied.append(copies)
        return True


def chains_everywhere(live: Chains, longest: int, prompt: Sequence[int], text: Sequence[int]) -> list[Chain]:
    """What a drafter drafts behind every token of a text but the last.

    Args:
        live: the drafter, of greedy chains; its draft model forgets the text that it is at.
        longest: most tokens of a chain.
        text: emitted tokens ``[n]``.
    """
    model = live.model if isinstance(live, CopyingDrafter) else live
    found: list[Chain] = []
    if isinstance(model, LookupDrafter):
        for at in range(len(text) - 1):
            chain = begun(live, None, [*prompt, *text[: at + 1]], longest)
            while chain.tree.size < longest and chain.grow():
                pass
            found.append(chain)
        return found
    assert isinstance(model, DraftModelDrafter)
    model.start([*prompt, text[0]], len(text) + TOGETHER * longest, NOTHING, np.random.default_rng(0))
    for run in same_vocabulary(model.vocabulary, text[:-1]):
        texts = [[*prompt, *text[: at + 1]] for at in range(run.start, run.stop)]
        chains = [begun(live, Told(model), so_far, longest) for so_far in texts]
        draft_together(model, chains, text[run], longest)
        found += chains
    return found


def begun(live: Chains, told: Told | None, text: Sequence[int], longest: int) -> Chain:
    """An empty chain behind a text, and what drafts it."""
    drafter: Told | CopyingDrafter | LookupDrafter
    if isinstance(live, LookupDrafter):
        drafter = LookupDrafter(live.vocab, live.context, live.ngram)
    else:
        assert told is not None
        drafter = CopyingDrafter(told) if isinstance(live, CopyingDrafter) else told
    drafter.start(text, 0, NOTHING, np.random.default_rng(0))
    return Chain(drafter, told, Tree(1, longest - 1))


def draft_together(model: DraftModelDrafter, chains: Sequence[Chain], tokens: Sequence[int], longest: int) -> None:
    """Grow the chains behind each of ``tokens`` ``[m]``, the next ones of the text; their rows stay in the model's cache.

    The model reads copied tokens one by one as well, where a single text would have read them with the next that it
    drafts: a row is the same in any batch.
    """
    m, committed = len(tokens), model.cache.length
    following = model.step(tokens, last=m)
    text, own = np.tril(np.ones((m, m), bool)), np.eye(m, dtype=bool)
    for size in range(longest):
        for i, chain in enumerate(chains):
            assert chain.told is not None
            row = slice(i, i + 1)
            chain.told.following = Children(following.tokens[row], following.log_probs[row], following.entropies[row])
            chain.grow()
        if size < longest - 1:
            ends = [int(chain.tree.tokens[-1]) for chain in chains]
            seen = np.concatenate([text, *[own] * (size + 1)], 1)
            following = model.step(ends, committed + np.arange(m) + size + 1, m, seen)
    model.cache.length = committed + m
