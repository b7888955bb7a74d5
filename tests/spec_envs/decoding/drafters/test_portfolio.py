"""Drafters that take turns leave the target's distribution as it is, by enumeration of every draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spec_envs.decoding import accept
from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.drafters.portfolio import Portfolio
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.tree import Children, Tree
from spec_envs.decoding.verifier import Traffic, Verdict
from tests.support.enumeration import VOCAB, Branch, Oracle, random_texts, total_variation

LENGTH = 3  # tokens of a text after its first one
Texts = dict[tuple[int, ...], np.ndarray]


class EnumeratedTarget:
    """A target whose distribution after every text is given, and whose draws are forks."""

    temperature, top_p, traffic, vocab, context = 1.0, 1.0, Traffic(), VOCAB, 99
    dtype = "float64"

    def __init__(self, oracle: Oracle, p: Texts):
        self.oracle, self.p = oracle, p
        self.device, self.features = torch.device("cpu"), torch.empty(0)

    def start(self, prompt: Sequence[int], rows: int, rng: Any) -> int:
        self.text: tuple[int, ...] = ()
        return 1

    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        def distribution(row: int) -> np.ndarray:
            path, node = [], row - 1
            while node >= 0:
                path.append(int(tokens[node]))
                node = int(parents[node])
            whole = (*self.text, *reversed(path))
            return self.p[whole] if len(whole) <= LENGTH else np.full(VOCAB, 1 / VOCAB)  # cut off in the end

        given = [[proposal.dense(VOCAB) for proposal in proposals]] if proposals else []
        rule: Any = accept.chained if proposals else accept.sampled
        path, token = rule(tokens, parents, *given, distribution, lambda: Branch(self.oracle))
        self.text = (*self.text, *(int(tokens[node]) for node in path), token)[: LENGTH + 1]
        return Verdict(path, token)


class Drawing(ChainDrafter):
    """Draws a chain from a distribution that is given after every text."""

    vocab, context, temperature = VOCAB, 99, 1.0

    def __init__(self, oracle: Oracle, q: Texts):
        self.oracle, self.q = oracle, q

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: Any) -> None:
        self.text: tuple[int, ...] = ()

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        self.text = (*self.text, *tokens)

    def draft(self, chain: list[int]) -> tuple[Children, int]:
        q = self.q[(*self.text, *chain)[:LENGTH]]
        token = self.oracle.fork(list(q))
        proposal = Proposal(np.flatnonzero(q), q[np.flatnonzero(q)])
        return Children(np.array([[token]]), np.log(np.array([[q[token] or 1.0]])), np.zeros(1), proposal), 1


class Fixed(Drawing):
    """Proposes the most probable tokens: the two best ones after every node as a tree, or the best one, as a copy."""

    def __init__(self, q: Texts, width: int):
        self.q, self.width = q, width

    def root(self, tree: Tree) -> int:
        tree.start(self.children([()]))
        return 1

    def expand(self, tree: Tree) -> int:
        tree.grow(self.children([path(tree, node) for node in tree.frontier.tolist()]))
        return 1

    def children(self, paths: Sequence[tuple[int, ...]]) -> Children:
        rows = np.array([self.q[(*self.text, *path)[:LENGTH]] for path in paths])
        tokens = np.argsort(-rows, 1, kind="stable")[:, : self.width]
        return Children(tokens, np.log(np.take_along_axis(rows, tokens, 1) + 1e-9), np.zeros(len(paths)))


def path(tree: Tree, node: int) -> tuple[int, ...]:
    """Return the tokens from the root to a node."""
    above = int(tree.parents[node])
    return (*(path(tree, above) if above >= 0 else ()), int(tree.tokens[node]))


@pytest.mark.parametrize("seed", range(3))
def test_taking_turns_keeps_the_targets_distribution(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who drafts next depends on what was emitted and accepted before, as an agent's choice does."""
    p, q = random_texts(LENGTH, seed)
    oracle, found, asked = Oracle(), dict[tuple, float](), set()

    def draw(weights: np.ndarray, u: Any) -> int:
        return oracle.fork(list(weights / weights.sum())) if weights.sum() else 0

    monkeypatch.setattr(accept, "inverse_cdf", draw)
    names = [DrafterName("lookup", ""), DrafterName("", "tree"), DrafterName("", "chain")]
    portfolio = Portfolio(names, [Fixed(q, 1), Fixed(q, 2), Drawing(oracle, q)], 2)
    clock = WallClock(torch.device("cpu"))
    decoder = Decoder(EnumeratedTarget(oracle, p), portfolio, clock, (), LENGTH)  # type: ignore[arg-type]

    def text() -> tuple[int, ...]:
        decoder.start([1], LENGTH + 1, np.random.default_rng(0))
        choice = seed
        while not decoder.finished:
            who = choice % 4 - 1
            asked.add(who)
            portfolio.choose(None if who < 0 else who)
            if who == 1:
                decoder.begin()
                decoder.expand()
                cycle = decoder.verify(3)
            else:
                cycle = decoder.cycle(2 - (who == 2))  # chains that are drawn branch at every token
            choice = 3 * sum(decoder.tokens) + cycle.accepted + seed
        return tuple(decoder.tokens[1:])

    for outcome, probability in oracle.walks(text):
        found[outcome] = found.get(outcome, 0.0) + probability
    exact = {
        whole: float(np.prod([p[whole[:i]][whole[i]] for i in range(LENGTH)])) for whole in p if len(whole) == LENGTH
    }
    assert asked == {-1, 0, 1, 2}
    assert total_variation(found, exact) < 1e-9
