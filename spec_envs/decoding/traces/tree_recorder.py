"""Draft the trees of many positions of a text: those of a head in one forward per level, blocks and copies one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.drafters.copying import Copies, CopyingTrees, copy_all
from spec_envs.decoding.drafters.eagle.drafter import EagleDrafter
from spec_envs.decoding.drafters.heads import BlockDrafter, HeadDrafter
from spec_envs.decoding.drafters.suffix import SuffixDrafter
from spec_envs.decoding.drafters.vocabulary import TOGETHER, same_vocabulary
from spec_envs.decoding.tree import Children, Tree

Trees = HeadDrafter[Any] | CopyingTrees | SuffixDrafter


@dataclass
class Drawn:
    """A tree that is drafted after a position of a text.

    Attributes:
        levels: the children of each of its levels.
        copied: True if it is of copies.
        matched: how many of the text's last tokens occurred in it before; 0 for a drafter that does not copy.
    """

    levels: list[Children]
    copied: bool = False
    matched: int = 0


class Levels(Tree):
    """A tree that keeps the children of its levels as they were proposed.

    Attributes:
        proposed: the children of each level.
    """

    def clear(self) -> None:
        self.proposed: list[Children] = []
        super().clear()

    def start(self, children: Children) -> None:
        super().start(children)
        self.proposed.append(children)

    def grow(self, children: Children) -> np.ndarray:
        self.proposed.append(children)
        return super().grow(children)


def trees_everywhere(
    live: Trees, depth: int, prompt: Sequence[int], text: Sequence[int], features: Tensor
) -> list[Drawn]:
    """Draft a tree after every token of a text but the last.

    Args:
        live: the drafter, which forgets the text that it has read.
        depth: expansions after the first level.
        prompt, text: the text's prompt, and its emitted tokens ``[n]``.
        features: of the target at every token before the last one, ``[prompt + n - 1, …]``.

    Returns:
        The trees ``[n - 1]``.

    Raises:
        ValueError: the drafter copies for another drafter than a head.
    """
    if isinstance(live, SuffixDrafter):
        return copies_everywhere(live, live.width, depth, prompt, text)
    head = live.head if isinstance(live, CopyingTrees) else live
    if isinstance(head, EagleDrafter):
        found = [Drawn(levels) for levels in heads_everywhere(head, depth, prompt, text, features)]
    elif isinstance(head, BlockDrafter):
        found = blocks_everywhere(head, depth, prompt, text, features)
    else:
        raise ValueError(f"trees of a {type(head).__name__} are not recorded; expected a head")
    if isinstance(live, CopyingTrees):
        for tree, copied in zip(found, copies_everywhere(live.copies, live.width, depth, prompt, text), strict=True):
            tree.matched = copied.matched
            if copied.levels:
                tree.levels, tree.copied = copied.levels, True
    return found


def copies_everywhere(
    live: Copies | SuffixDrafter, width: int, depth: int, prompt: Sequence[int], text: Sequence[int]
) -> list[Drawn]:
    """Draft a tree, or a chain, of copies after every token of a text but the last; empty where nothing is copied."""
    seen = live.seen if isinstance(live, SuffixDrafter) else live
    seen.start([*prompt, text[0]])
    found = []
    for token in text[1:]:
        tree = Levels(width, depth)
        if isinstance(live, SuffixDrafter):
            live.root(tree)
            for _ in range(depth):
                live.expand(tree)
        else:
            copy_all(live, tree)
        found.append(Drawn(tree.proposed, True, seen.matched()))
        seen.append([token])
    return found


def blocks_everywhere(
    live: BlockDrafter[Any], depth: int, prompt: Sequence[int], text: Sequence[int], features: Tensor
) -> list[Drawn]:
    """Draft a block after every token of a text but the last, each by a forward of its own."""
    start = len(prompt)
    live.start([*prompt, text[0]], len(text), features[:start], np.random.default_rng(0))
    found = []
    for at, token in enumerate(text[1:], start):
        tree = Levels(live.width, depth)
        live.root(tree)
        while len(tree.proposed) < live.block:
            live.expand(tree)
        found.append(Drawn(tree.proposed))
        live.commit([token], features[at : at + 1])
    return found


@torch.inference_mode()
def heads_everywhere(
    live: EagleDrafter, depth: int, prompt: Sequence[int], text: Sequence[int], features: Tensor
) -> list[list[Children]]:
    """Draft a tree with an EAGLE-3 head after every token of a text but the last.

    Args:
        live: the drafter; its head and width are used, its cache is not.
        depth: expansions after the first level.
        prompt, text: the text's prompt, and its emitted tokens ``[n]``.
        features: of the target at every token before the last one, ``[prompt + n - 1, …]``.

    Returns:
        For each of the trees ``[n - 1]`` the children of its levels.
    """
    drafter = EagleDrafter(live.model, live.width, TOGETHER * (depth + 1))
    drafter.start([*prompt, text[0]], len(text) + TOGETHER, features[: len(prompt)], np.random.default_rng(0))
    found: list[list[Children]] = []
    for run in same_vocabulary(drafter.vocabulary, text[:-1]):
        rows = slice(len(prompt) - 1 + run.start, len(prompt) - 1 + run.stop)
        found += trees_together(drafter, features[rows], text[run], depth)
    return found


def trees_together(drafter: EagleDrafter, features: Tensor, tokens: Sequence[int], depth: int) -> list[list[Children]]:
    """Draft a tree after each of ``tokens`` ``[m]``, the next ones of the text, and commit them to the drafter's cache.

    Args:
        drafter: whose cache holds the text before.
        features: of the target at the token before each, ``[m, …]``.
        tokens: of the text.
        depth: expansions after the first level.

    Returns:
        For each of the trees ``[m]`` the children of its levels.
    """
    model, cache, width, m = drafter.model, drafter.cache, drafter.width, len(tokens)
    hidden, roots = drafter.catch_up(features, tokens, m)
    committed, rows = cache.length, m * width
    trees = [Tree(width, depth) for _ in tokens]
    levels = [[row(roots, i, 1)] for i in range(m)]
    for tree, first in zip(trees, levels, strict=True):
        tree.start(first[0])
    entering = hidden.repeat_interleave(width, 0)
    lineages = [np.eye(width, dtype=bool) for _ in tokens]  # which rows of its own each frontier node sees
    prefix = np.repeat(np.tril(np.ones((m, m), dtype=bool)), width, 0)
    base = np.repeat(committed - m + 1 + np.arange(m), width)
    for level in range(depth):
        seen = np.zeros((rows, m + (level + 1) * rows), dtype=bool)
        seen[:, :m] = prefix
        for i, lineage in enumerate(lineages):
            for earlier in range(level + 1):
                start = m + earlier * rows + i * width
                own = lineage[:, earlier * width : (earlier + 1) * width]
                seen[i * width : (i + 1) * width, start : start + width] = own
        frontier = np.concatenate([tree.tokens[tree.frontier] for tree in trees])
        cache.length = committed + level * rows
        output, children = model.step(entering, frontier, base + level, cache, drafter.vocabulary, width, rows, seen)
        cache.length = committed
        kept = []
        for i, tree in enumerate(trees):
            own_children = row(children, i, width)
            levels[i].append(own_children)
            parents = tree.grow(own_children)
            kept.append(i * width + parents)
            lineages[i] = np.concatenate([lineages[i][parents], np.eye(width, dtype=bool)], axis=1)
        entering = output[torch.from_numpy(np.concatenate(kept)).to(output.device)]
    return levels


def row(children: Children, i: int, count: int) -> Children:
    """Return the children of the rows from ``i * count`` up to ``(i + 1) * count``."""
    own = slice(i * count, (i + 1) * count)
    return Children(children.tokens[own], children.log_probs[own], children.entropies[own])
