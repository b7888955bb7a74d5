"""Acceptance rules: which drafted nodes the target keeps, and the token that it adds itself.

Each rule walks a verified subtree from the root. ``parents`` holds the index of each node's parent, or ``ROOT``. Row 0
of the target's output belongs to the root, row i + 1 to node i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from spec_envs.decoding.sampling import inverse_cdf
from spec_envs.decoding.tree import ROOT


def children_of(parents: np.ndarray, node: int) -> np.ndarray:
    """Return the indices of the children of ``node``, ascending."""
    return np.flatnonzero(parents == node)


def greedy(tokens: np.ndarray, parents: np.ndarray, choices: np.ndarray) -> tuple[list[int], int]:
    """Keep the path on which every token is the target's own choice.

    Args:
        tokens, parents: the verified nodes, ``[n]``.
        choices: the target's argmax at the root and at every node, ``[n + 1]``.

    Returns:
        The accepted nodes from the root on, and the target's choice after them.
    """
    if not len(tokens):
        return [], int(choices[0])
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
    """Keep a path so that the emitted tokens are distributed as the target's own samples.

    The children of a node are a fixed set of distinct tokens, tested in order: x is accepted with the probability p(x)
    that the target gives it among the tokens not rejected before, and a rejected token is removed from p. When all
    children are rejected, the token after the path is drawn from the rest of p (SpecInfer, arXiv 2305.09781, for a
    deterministic drafter).

    Args:
        tokens, parents: the verified nodes, ``[n]``.
        probabilities: returns the target's distribution ``[vocab]`` at a row (0 is the root).
        uniform: draws a number from [0, 1).

    Returns:
        The accepted nodes from the root on, and the token drawn after them.
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
    parents: np.ndarray,
    proposals: Sequence[np.ndarray],
    probabilities: Callable[[int], np.ndarray],
    uniform: Callable[[], float],
) -> tuple[list[int], int]:
    """Keep a prefix of a drawn chain, and perhaps an alternative after it, so that the emitted tokens are distributed as
    the target's own samples.

    A token x drawn from q is accepted with probability min(1, p(x)/q(x)). After the first rejection the next token is
    drawn from max(0, p − q), after a wholly accepted chain from the target's next distribution (Leviathan et al. 2023,
    arXiv 2211.17192, algorithm 1). Alternatives of the rejected token only depend on q and on the token itself, so they
    are tested in turn as candidates for the draw from max(0, p − q), as the children of a node of a tree are
    (``sampled``).

    Args:
        tokens, parents: the verified nodes ``[n]``: a chain, then alternatives of its tokens.
        proposals: the distribution ``[vocab]`` from which each token of the chain was drawn.
        probabilities: returns the target's distribution ``[vocab]`` at a row (0 is the root).
        uniform: draws a number from [0, 1).

    Returns:
        The accepted nodes from the root on, and the token drawn after them.
    """
    chain = tokens[: len(proposals)]
    kept = prefix(chain, [q[token] for q, token in zip(proposals, chain, strict=True)], probabilities, uniform)
    path, p = list(range(kept)), probabilities(kept)
    if kept == len(chain):
        return path, inverse_cdf(p, uniform())
    left = residual(p, proposals[kept])
    for node in range(len(chain), len(tokens)):
        if parents[node] == kept - 1:
            if uniform() * left.sum() < left[tokens[node]]:
                return [*path, node], inverse_cdf(probabilities(node + 1), uniform())
            left[tokens[node]] = 0.0
    return path, inverse_cdf(left, uniform())


def prefix(
    tokens: np.ndarray,
    chances: Sequence[float],
    probabilities: Callable[[int], np.ndarray],
    uniform: Callable[[], float],
) -> int:
    """Return how many tokens of a drawn chain are accepted.

    This is the first half of ``chained``. It needs no whole proposals, only ``chances``: the probability q(x) with
    which each token was drawn.
    """
    for node, (token, chance) in enumerate(zip(tokens.tolist(), chances, strict=True)):
        if not uniform() * chance < probabilities(node)[token]:
            return node
    return len(tokens)


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return max(0, p − q) ``[vocab]``, not normalised: the distribution of the token after the first rejection.

    Args:
        p, q: the distributions ``[vocab]`` of the target and of the drafter.
    """
    gain: np.ndarray = np.maximum(p - q, 0.0)
    return gain
