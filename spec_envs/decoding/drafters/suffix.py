"""Suffix decoding (Oliaro et al. 2024, arXiv 2411.04975): draft what followed earlier occurrences of the text's end, by
how often each continuation followed, without any weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import nlargest
from operator import itemgetter

import numpy as np
from torch import Tensor

from spec_envs.decoding.drafters.lookup import LONGEST, Copy, copy_probability
from spec_envs.decoding.tree import NEVER, Children, Tree

REMEMBERED = 8192  # most tokens of earlier answers that are kept
COUNT = itemgetter(1)  # of a token and how often it followed
LIKELY = 0.5  # the least probability of a token that is copied before a model is asked

Ends = list["Node"]
"""The ends of the runs that a text ends with: of no token, of the last token, of the last two, …"""


class Node:
    """The end of a run of tokens that occurred.

    Attributes:
        count: how often it occurred.
        next: the runs that are longer by one token, by that token; the one that occurred last comes last.
    """

    __slots__ = ("count", "next")

    def __init__(self) -> None:
        self.count = 0
        self.next: dict[int, Node] = {}

    def add(self, token: int) -> Node:
        """Count an occurrence of the run that continues this one, and return its end."""
        node = self.next.pop(token, None) or Node()
        node.count += 1
        self.next[token] = node
        return node


class Suffixes:
    """A tree of all runs of up to ``LONGEST`` + 1 tokens of a text and of others before it, with their frequencies.

    A token is added in ``LONGEST`` + 1 operations.

    Args:
        remembered: most tokens of earlier answers that are kept; the oldest are forgotten first.
        least: the smallest probability of a token that ``find`` returns.
    """

    def __init__(self, remembered: int = 0, least: float = 0.0):
        self.remembered, self.least = remembered, least
        self.top = Node()
        self.answers: deque[list[int]] = deque()
        self.text: list[int] = []
        self.answer = 0  # where the answer begins in the text
        self.ends: Ends = [self.top]
        self.chain: list[int] = []  # the drafted tokens that were looked up last, and the ends of the runs after them
        self.chain_ends = self.ends

    def start(self, text: Sequence[int]) -> None:
        """Leave the last text, of which only the answer is remembered, and begin a new one.

        Args:
            text: a prompt and the first token of its answer.
        """
        if self.remembered:
            self._remove(self.text)
            self._remember(self.text[self.answer :][-self.remembered :])
        else:
            self.top = Node()
        self.text, self.answer, self.ends = [], len(text) - 1, [self.top]
        self.append(text)

    def anew(self) -> Suffixes:
        """Return another that has read nothing."""
        return Suffixes(self.remembered, self.least)

    def append(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        self.text += tokens
        for token in tokens:
            self.ends = self._added(self.ends, token)
        self.chain, self.chain_ends = [], self.ends

    def matched(self) -> int:
        """Return how many of the text's last tokens occurred before, up to ``LONGEST``; see ``Copier``."""
        return next((n for n in range(len(self.ends) - 1, 0, -1) if self.ends[n].next), 0)

    def find(self, chain: list[int]) -> Copy | None:
        """Return the most probable token after the text and ``chain``; None if its probability is too small."""
        known = len(self.chain)
        if chain[:known] != self.chain:
            self.chain, self.chain_ends, known = [], self.ends, 0
        for token in chain[known:]:
            self.chain_ends = self.after(self.chain_ends, token)
        self.chain = list(chain)
        found = self.continuations(self.chain_ends, 1)
        return found[0] if found and found[0].probability >= self.least else None

    def after(self, ends: Ends, token: int) -> Ends:
        """Return the ends of the runs that occurred, one token after ``ends``."""
        found = [self.top]
        for end in ends[:LONGEST]:
            if token not in end.next:
                break
            found.append(end.next[token])
        return found

    def continuations(self, ends: Ends, most: int) -> list[Copy]:
        """Return the tokens that followed the last ones before, the most probable first, up to ``most``.

        The longest run that occurred before goes on as it did with the probability that a copy after so many tokens has
        (``copy_probability``), with each token by its share of the occurrences. What is left goes to the tokens that
        followed the next shorter run only, and so on, as escapes do in prediction by partial matching (Cleary & Witten
        1984).
        """
        found: dict[int, Copy] = {}
        left = 1.0
        for matched in range(len(ends) - 1, 0, -1):
            new = [(token, node.count) for token, node in reversed(ends[matched].next.items()) if token not in found]
            if new:
                chance = copy_probability(matched)
                share = left * chance / sum(count for _, count in new)
                left *= 1 - chance
                # None beyond the most frequent ones is returned, and no shorter run is looked at once there are enough.
                likely = nlargest(most, new, key=COUNT) if len(new) > most else new
                found |= {token: Copy(token, matched, share * count) for token, count in likely}
                if len(found) >= most:
                    break
        return sorted(found.values(), key=lambda copy: -copy.probability)[:most]

    def _added(self, ends: Ends, token: int) -> Ends:
        return [self.top, *(end.add(token) for end in ends)][: LONGEST + 1]

    def _remember(self, answer: list[int]) -> None:
        """Keep an answer, and forget the oldest ones if there is no room."""
        ends = [self.top]
        for token in answer:
            ends = self._added(ends, token)
        self.answers.append(answer)
        while sum(map(len, self.answers)) > self.remembered:
            self._remove(self.answers.popleft())

    def _remove(self, text: list[int]) -> None:
        """Take back the occurrences of a text that was added as a whole."""
        for begin in range(len(text)):
            node = self.top
            for token in text[begin : begin + LONGEST + 1]:
                child = node.next[token]
                child.count -= 1
                if not child.count:
                    del node.next[token]
                    break
                node = child


class SuffixDrafter:
    """Drafts how earlier occurrences of the text's end went on: a tree of the most frequent continuations, at width 1 a
    chain.

    Where nothing occurred before, the tree stays empty and the cycle is a step of plain decoding. No forward is made.

    Args:
        vocab, context: of the target.
        width: most children per node, and most nodes expanded per level.
        remembered: most tokens of earlier answers that are drafted from; with 0 the text alone is.
    """

    capture: tuple[int, ...] = ()
    lag, drafting = 0, ""

    def __init__(self, vocab: int, context: int, width: int, remembered: int = 0):
        self.vocab, self.context, self.width = vocab, context, width
        self.seen = Suffixes(remembered)
        self.paths: list[Ends] = []  # of the frontier's nodes

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text, except for its answer if answers are remembered, and read this one."""
        self.seen.start(text)

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Append tokens to the text."""
        self.seen.append(tokens)

    def root(self, tree: Tree) -> int:
        """Start the tree with what followed the text's end before; return 0, for there is no forward."""
        tree.clear()
        children = self._children([self.seen.ends])
        if children is not None:
            tree.start(children)
            self.paths = [self.seen.after(self.seen.ends, token) for token in tree.tokens.tolist()]
        return 0

    def expand(self, tree: Tree) -> int:
        """Grow the tree by what followed its frontier before, if anything did; return 0, since no forward runs."""
        children = self._children(self.paths) if tree.size else None
        if children is not None:
            parents = tree.grow(children)
            tokens = tree.tokens[tree.frontier]
            self.paths = [self.seen.after(self.paths[i], t) for i, t in zip(parents, tokens.tolist(), strict=True)]
        return 0

    def matched(self) -> int:
        """Return how many of the text's last tokens occurred before; see ``Copier``."""
        return self.seen.matched()

    def source(self, chain: list[int]) -> Copy | None:
        """Return the token that would be copied after ``chain``, or None."""
        return self.seen.find(chain)

    def ahead(self, longest: int) -> list[int]:
        """Return the chain of up to ``longest`` tokens that would be drafted now; see ``FreeDrafter``."""
        chain: list[int] = []
        while len(chain) < longest and (copy := self.seen.find(chain)) is not None:
            chain.append(copy.token)
        return chain

    def _children(self, paths: list[Ends]) -> Children | None:
        """Return the children of nodes that these runs end at; None if none has any."""
        shape = len(paths), self.width
        tokens, probabilities = np.zeros(shape, np.int64), np.zeros(shape)
        for i, ends in enumerate(paths):
            for j, copy in enumerate(self.seen.continuations(ends, self.width)):
                tokens[i, j], probabilities[i, j] = copy.token, copy.probability
        if not probabilities.any():
            return None
        there = probabilities > 0
        log_probs = np.log(probabilities, out=np.full(shape, NEVER), where=there)
        rest = np.maximum(1 - probabilities.sum(1), 1e-9)  # the probability of any other token
        entropies = -(probabilities * np.where(there, log_probs, 0.0)).sum(1) - rest * np.log(rest)
        return Children(tokens, log_probs.astype(np.float32), entropies.astype(np.float32))
