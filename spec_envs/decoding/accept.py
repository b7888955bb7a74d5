"""Acceptance rules: which drafted nodes the target keeps, and the token it adds itself.

Each rule walks a verified subtree from the root. ``parents`` holds, per node, the index of its parent node or
``ROOT``; rows of the target's output are the root (row 0) and the nodes (row = node + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from spec_envs.decoding.sampling import inverse_cdf
from spec_envs.decoding.tree import ROOT


def children_of(parents: np.ndarray, node: int) -> np.ndarray:
    """Child nodes of ``node`` in order of their index."""
    return np.flatnonzero(parents == node)


def greedy(tokens: np.ndarray, parents: np.ndarray, choices: np.ndarray) -> tuple[list[int], int]:
    """Keep the path on which every token is the target's own choice.

    Args:
        tokens, parents: the verified nodes, ``[n]``.
        choices: the target's argmax at the root and at every node, ``[n + 1]``.

    Returns:
        Accepted nodes from the root on, and the target's choice behind them.
    """
    nodes = {edge: node for node, edge in enumerate(zip(parents.tolist(), tokens.tolist(), strict=True))}
    path, node, chosen = [], ROOT, choices.tolist()
    while (child := nodes.get((node, chosen[node + 1]))) is not None:
        path.append(child)
        node = child
    return path, chosen[node + 1]


def sampled(
    tokens: np.ndarray,
    parents: np.ndarray,
    probabilities: Callable[[int], np.ndarray],
    uniform: Callable[[], float],
) -> tuple[list[int], int]:
    """Keep a path so that what is emitted is distributed as the target's own samples.

    The children of a node are a fixed set of distinct tokens. They are tested in order: x is accepted with the
    probability p(x) that the target gives it among the tokens not yet refused; a refused token leaves p. When all
    are refused the token behind the path is drawn from what is left of p (SpecInfer, arXiv 2305.09781, for a
    deterministic drafter).

    Args:
        tokens, parents: the verified nodes, ``[n]``.
        probabilities: the target's distribution ``[vocab]`` at a row (0 is the root).
        uniform: draws from [0, 1).

    Returns:
        Accepted nodes from the root on, and the token drawn behind them.
    """
    path: list[int] = []
    node = ROOT
    while True:
        p = np.array(probabilities(node + 1), dtype=np.float64)
        for child in children_of(parents, node):
            token = tokens[child]
            if uniform() * p.sum() < p[token]:
                path.append(int(child))
                node = int(child)
                break
            p[token] = 0.0
        else:
            return path, inverse_cdf(p, uniform())


def chained(
    tokens: np.ndarray,
    proposals: Sequence[np.ndarray],
    probabilities: Callable[[int], np.ndarray],
    uniform: Callable[[], float],
) -> tuple[list[int], int]:
    """Keep a prefix of a drawn chain so that what is emitted is distributed as the target's own samples.

    x drawn from q is accepted with probability min(1, p(x)/q(x)); behind the first refusal the token is drawn from what
    p has over q, max(0, p − q), and behind an accepted chain from the target's next distribution (Leviathan et al. 2023,
    arXiv 2211.17192, algorithm 1).

    Args:
        tokens: the chain ``[n]``.
        proposals: the distribution ``[vocab]`` that each was drawn from.
        probabilities: the target's distribution ``[vocab]`` at a row (0 is the root).
        uniform: draws from [0, 1).

    Returns:
        Accepted nodes from the root on, and the token drawn behind them.
    """
    kept = prefix(tokens, [q[token] for q, token in zip(proposals, tokens, strict=True)], probabilities, uniform)
    p = probabilities(kept)
    return list(range(kept)), inverse_cdf(p if kept == len(tokens) else residual(p, proposals[kept]), uniform())


def prefix(
    tokens: np.ndarray,
    chances: Sequence[float],
    probabilities: Callable[[int], np.ndarray],
    uniform: Callable[[], float],
) -> int:
    """How many tokens of a drawn chain are kept: the first half of ``chained``, for which it is enough to know the
    ``chances`` q(x) that the drafted tokens had."""
    for node, (token, chance) in enumerate(zip(tokens.tolist(), chances, strict=True)):
        if not uniform() * chance < probabilities(node)[token]:
            return node
    return len(tokens)


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What the target's distribution ``[vocab]`` has over the draft's, from which the token behind the first refusal is
    drawn (unnormalised)."""
    return np.maximum(p - q, 0.0)
