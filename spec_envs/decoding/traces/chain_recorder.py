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
from spec_envs.decoding.drafters.suffix import SuffixDrafter
from spec_envs.decoding.drafters.vocabulary import TOGETHER, same_vocabulary
from spec_envs.decoding.tree import Beside, Children, Tree

Chains = DraftModelDrafter | CopyingDrafter | LookupDrafter | SuffixDrafter
NO_FEATURES = torch.empty(0)  # features of the target, which no drafter of chains reads


class Scripted(ChainDrafter):
    """Stands for a draft model in one of many chains whose forwards are made together; it drafts what it was given.

    Args:
        model: the draft model.

    Attributes:
        following: the child of the chain's last token, set before it is drafted.
    """

    def __init__(self, model: DraftModelDrafter):
        self.vocab, self.context, self.temperature = model.vocab, model.context, model.temperature
        self.following: Children

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Do nothing: there is no state."""

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Do nothing: there is no state."""

    def draft(self, chain: list[int]) -> tuple[Children, int]:
        return self.following, 1


@dataclass
class Chain:
    """A chain that is drafted after a position of a text.

    Attributes:
        drafter: drafts it.
        tree: the chain so far.
        matched: how many of the text's last tokens match an earlier place; 0 without one.
        copied: for each drafted token whether it was copied.
    """

    drafter: Scripted | CopyingDrafter | LookupDrafter | SuffixDrafter
    tree: Tree
    matched: int = 0
    copied: list[bool] = field(default_factory=list)

    def grow(self) -> bool:
        """Draft a token; return whether there was one."""
        size, copier = self.tree.size, None if isinstance(self.drafter, Scripted) else self.drafter
        if copier and not size:
            self.matched = copier.matched()
        copies = copier is not None and copier.source(self.tree.tokens.tolist()) is not None
        (self.drafter.expand if size else self.drafter.root)(self.tree)
        if self.tree.size == size:
            return False
        self.copied.append(copies)
        return True


def chains_everywhere(live: Chains, longest: int, prompt: Sequence[int], text: Sequence[int]) -> list[Chain]:
    """Draft a chain after every token of a text but the last.

    Args:
        live: the drafter, of greedy chains; it forgets the text that it has read.
        longest: most tokens of a chain.
        prompt, text: the text's prompt, and its emitted tokens ``[n]``.

    Returns:
        The chains ``[n - 1]``.

    Raises:
        ValueError: the drafter copies for another model than a draft model.
    """
    found: list[Chain] = []
    if isinstance(live, LookupDrafter | SuffixDrafter):
        live.start([*prompt, text[0]], 0, NO_FEATURES, np.random.default_rng(0))
        for token in text[1:]:
            chain = Chain(live, Tree(1, longest - 1))
            while chain.tree.size < longest and chain.grow():
                pass
            found.append(chain)
            live.commit([token], NO_FEATURES)
        return found
    model = live.model if isinstance(live, CopyingDrafter) else live
    if not isinstance(model, DraftModelDrafter):
        raise ValueError(f"chains of a {type(model).__name__} cannot be drafted together; expected a draft model")
    model.start([*prompt, text[0]], len(text) + TOGETHER * longest, NO_FEATURES, np.random.default_rng(0))
    for run in same_vocabulary(model.vocabulary, text[:-1]):
        scripts = [Scripted(model) for _ in range(run.start, run.stop)]
        chains = [
            begun(
                CopyingDrafter(script, live.copies.anew()) if isinstance(live, CopyingDrafter) else script,
                [*prompt, *text[: at + 1]],
                longest,
            )
            for at, script in zip(range(run.start, run.stop), scripts, strict=True)
        ]
        draft_together(model, chains, scripts, text[run], longest)
        found += chains
    return found


def begun(drafter: Scripted | CopyingDrafter, text: Sequence[int], longest: int) -> Chain:
    """Return an empty chain of ``drafter`` after a text."""
    drafter.start(text, 0, NO_FEATURES, np.random.default_rng(0))
    return Chain(drafter, Tree(1, longest - 1))


def draft_together(
    model: DraftModelDrafter,
    chains: Sequence[Chain],
    scripts: Sequence[Scripted],
    tokens: Sequence[int],
    longest: int,
) -> None:
    """Grow the chains after each of ``tokens`` ``[m]``, the next ones of the text, and commit the tokens to the model's
    cache.

    The model reads copied tokens one by one as well, where a decoder reads them together with the next token that it
    drafts: a row's result does not depend on its batch.

    Args:
        model: the draft model.
        chains, scripts: the chain after each token, and what stands for the model in it.
        tokens: of the text.
        longest: most tokens of a chain.
    """
    m, committed = len(tokens), model.cache.length
    following = model.step(tokens, last=m)
    text, own = np.tril(np.ones((m, m), bool)), np.eye(m, dtype=bool)
    for size in range(longest):
        for i, (chain, script) in enumerate(zip(chains, scripts, strict=True)):
            script.following = children_of(following, slice(i, i + 1))
            chain.grow()
        if size < longest - 1:
            ends = [int(chain.tree.tokens[-1]) for chain in chains]
            seen = np.concatenate([text, *[own] * (size + 1)], 1)
            following = model.step(ends, committed + np.arange(m) + size + 1, m, seen)
    model.cache.length = committed + m


def children_of(following: Children, rows: slice) -> Children:
    """Return what a draft model proposes after some of the rows of a forward."""
    beside = following.beside
    return Children(
        following.tokens[rows],
        following.log_probs[rows],
        following.entropies[rows],
        beside=None if beside is None else Beside(beside.tokens[rows], beside.log_probs[rows]),
    )
