"""Acceptance rules keep the target's distribution, by enumeration of every branch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from spec_envs.decoding import accept
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.tree import ROOT
from tests.support.enumeration import VOCAB, Branch, Oracle, chained_exactly, random_texts, total_variation


def random_tree(rng: np.random.Generator, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and parents of a random connected tree whose siblings have distinct tokens."""
    tokens, parents = [], []
    while len(tokens) < nodes:
        parent = int(rng.integers(-1, len(tokens)))
        free = sorted(set(range(VOCAB)) - {tokens[i] for i in range(len(tokens)) if parents[i] == parent})
        if free:
            tokens.append(int(rng.choice(free)))
            parents.append(parent)
    return np.array(tokens, dtype=np.int64), np.array(parents, dtype=np.int64)


def emitted(tokens: np.ndarray, result: tuple[list[int], int]) -> tuple[int, ...]:
    path, last = result
    return (*(int(tokens[n]) for n in path), last)


def distribution(rule: Callable, tokens: np.ndarray, parents: Any, p: np.ndarray) -> dict[tuple, float]:
    """Return the distribution of the tokens that a rule emits; ``parents`` are those of a tree, or the proposals of
    a chain."""
    oracle = Oracle()
    found: dict[tuple, float] = {}

    def draw(weights: np.ndarray, u: Any) -> int:
        if weights.sum() == 0:  # in a branch of probability 0
            return 0
        return oracle.fork(list(weights / weights.sum()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accept, "inverse_cdf", draw)
        outcomes = oracle.walks(
            lambda: emitted(tokens, rule(tokens, parents, lambda row: p[row], lambda: Branch(oracle)))
        )
    for outcome, probability in outcomes:
        found[outcome] = found.get(outcome, 0.0) + probability
    return found


def target_distribution(tokens: np.ndarray, parents: np.ndarray, p: np.ndarray) -> dict[tuple, float]:
    """Return the distribution of sampling from the target until the first token that is not a node."""
    exact: dict[tuple, float] = {}

    def walk(node: int, prefix: tuple[int, ...], probability: float) -> None:
        for token in range(VOCAB):
            below = probability * p[node + 1][token]
            child = [c for c in accept.children_of(parents, node) if tokens[c] == token]
            if child:
                walk(int(child[0]), (*prefix, token), below)
            else:
                exact[(*prefix, token)] = below

    walk(ROOT, (), 1.0)
    return exact


@pytest.mark.parametrize("nodes", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_tree_sampling_keeps_targets_distribution(nodes: int, seed: int) -> None:
    rng = np.random.default_rng(100 * nodes + seed)
    tokens, parents = random_tree(rng, nodes)
    p = rng.dirichlet(np.ones(VOCAB), size=nodes + 1)
    if seed == 3:  # zeros, as top-p produces them
        p[p < 0.15] = 0.0
        p /= p.sum(1, keepdims=True)
    found = distribution(accept.sampled, tokens, parents, p)
    assert total_variation(found, target_distribution(tokens, parents, p)) < 1e-12


def chain_distribution(rule: Callable, length: int, p: dict, q: dict, alternatives: int = 0) -> dict[tuple, float]:
    """Return the distribution of the tokens that a cycle emits when its chain is sampled from the draft, and the most
    probable other tokens are verified beside each of the chain."""
    found: dict[tuple, float] = {}
    for tokens in itertools.product(range(VOCAB), repeat=length):
        proposals = [q[tokens[:i]] for i in range(length)]
        drawn = np.prod([proposal[token] for proposal, token in zip(proposals, tokens, strict=True)])
        if drawn == 0:
            continue
        beside = [
            (i, token)
            for i, proposal in enumerate(proposals)
            for token in Proposal(np.arange(VOCAB), proposal).best(alternatives, tokens[i]).tolist()
        ]
        nodes = np.array([*tokens, *(token for _, token in beside)], dtype=np.int64)
        parents = np.array([*range(-1, length - 1), *(i - 1 for i, _ in beside)])
        rows = np.array([p[tokens[:i]] for i in range(length + 1)] + [p[(*tokens[:i], token)] for i, token in beside])
        bound = functools.partial(rule, nodes, parents)
        whole = lambda _, given, *rest, bound=bound: bound(given, *rest)  # noqa: E731
        for outcome, probability in distribution(whole, nodes, proposals, rows).items():
            found[outcome] = found.get(outcome, 0.0) + drawn * probability
    return found


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alternatives", [0, 1, 3])
def test_sampled_chains_keep_targets_distribution(length: int, seed: int, alternatives: int) -> None:
    p, q = random_texts(length, seed)
    found = chain_distribution(accept.chained, length, p, q, alternatives)
    assert chained_exactly(found, length, p) < 1e-12
    longest = sum(probability for text, probability in found.items() if len(text) == length + 1)
    alone = sum(
        probability
        for text, probability in chain_distribution(accept.chained, length, p, q).items()
        if len(text) == length + 1
    )
    if alternatives and seed < 3:  # with zeros the target may never choose what the draft does
        assert longest > alone
    else:
        assert longest >= alone or longest == pytest.approx(alone)


def test_enumeration_detects_alternatives_of_the_wrong_distribution() -> None:
    """Testing an alternative against the target's distribution, and not against what is left of it, is biased."""

    def wrong(tokens: Any, parents: Any, proposals: Any, probabilities: Any, uniform: Any) -> tuple[list[int], int]:
        p = probabilities(0).copy()
        if uniform() * proposals[0][tokens[0]] < p[tokens[0]]:
            return [0], accept.inverse_cdf(probabilities(1), uniform())
        if uniform() * p.sum() < p[tokens[1]]:
            return [1], accept.inverse_cdf(probabilities(2), uniform())
        left = accept.residual(p, proposals[0])
        left[tokens[1]] = 0.0
        return [], accept.inverse_cdf(left, uniform())

    p, q = random_texts(1, 0)
    assert chained_exactly(chain_distribution(wrong, 1, p, q, 1), 1, p) > 0.01


def test_enumeration_detects_wrong_residual() -> None:
    """Zeroing only the rejected token gives (.425, .275, .30), while the target has (.4, .4, .2)."""

    def wrong(tokens: Any, parents: Any, proposals: Any, probabilities: Any, uniform: Any) -> tuple[list[int], int]:
        p = probabilities(0).copy()
        if uniform() * proposals[0][tokens[0]] < p[tokens[0]]:
            return [0], accept.inverse_cdf(probabilities(1), uniform())
        p[tokens[0]] = 0.0
        return [], accept.inverse_cdf(p, uniform())

    p, q = random_texts(1, 0)
    p[()], q[()] = np.array([0.4, 0.4, 0.2, 0, 0]), np.array([0.7, 0.05, 0.25, 0, 0])
    first = np.zeros(VOCAB)
    for text, probability in chain_distribution(wrong, 1, p, q).items():
        first[text[0]] += probability
    assert first[:3] == pytest.approx([0.425, 0.275, 0.30])
    assert chained_exactly(chain_distribution(wrong, 1, p, q), 1, p) > 0.1


def test_enumeration_detects_wrong_tree_rule() -> None:
    """Testing the second child with its unrenormalised probability is biased, which the enumeration shows."""

    def wrong(tokens: Any, parents: Any, probabilities: Any, uniform: Any) -> tuple[list[int], int]:
        path, node = [], ROOT
        while True:
            p = probabilities(node + 1).copy()
            for child in accept.children_of(parents, node):
                if uniform() * 1.0 < probabilities(node + 1)[tokens[child]]:
                    path.append(int(child))
                    node = int(child)
                    break
                p[tokens[child]] = 0.0
            else:
                return path, accept.inverse_cdf(p, uniform())

    rng = np.random.default_rng(5)
    tokens, parents = np.array([0, 1, 2]), np.array([ROOT, ROOT, 0])
    p = rng.dirichlet(np.ones(VOCAB), size=4)
    assert total_variation(distribution(wrong, tokens, parents, p), target_distribution(tokens, parents, p)) > 0.01


def test_greedy_follows_targets_choices() -> None:
    tokens, parents = np.array([3, 4, 1, 2, 0]), np.array([ROOT, ROOT, 0, 0, 3])
    assert accept.greedy(tokens, parents, np.array([3, 2, 9, 9, 0, 7])) == ([0, 3, 4], 7)
    assert accept.greedy(tokens, parents, np.array([8, 2, 9, 9, 0, 7])) == ([], 8)
    assert accept.greedy(tokens[:0], parents[:0], np.array([5])) == ([], 5)


def test_inverse_cdf_never_draws_a_zero() -> None:
    weights = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    drawn = [accept.inverse_cdf(weights, u) for u in np.append(np.linspace(0, 1, 1000, endpoint=False), 1 - 1e-17)]
    assert set(drawn) == {1, 3, 4}
    assert abs(np.mean(np.array(drawn) == 3) - 0.5) < 0.01
