"""From a drafter's logits to the one child of a chain's last node: the most probable token, or one that is drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.sampling import Proposal, probabilities
from spec_envs.decoding.tree import Beside, Children

MostProbable = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor, Tensor]]


def most_probable_child(
    logits: Tensor, extra: Tensor | None, ids: np.ndarray | None, most_probable: MostProbable, columns: int = 1
) -> Children:
    """Return the most probable token of each row, and the next ones as its alternatives.

    Args:
        logits, extra: ``[n, a]`` and ``[n, b]`` (or None), taken side by side.
        ids: the target's ids of the ``a + b`` outputs; None where an output's index is its id.
        most_probable: ``layers.most_probable`` or ``integers.most_probable``.
        columns: tokens of each row, the alternatives included.
    """
    index, *rest = most_probable(logits, extra, columns)
    tokens, (log_probs, entropies) = index.cpu().numpy(), (values.cpu().numpy() for values in rest)
    return first_of(tokens if ids is None else ids[tokens], log_probs, entropies)


def first_of(tokens: np.ndarray, log_probs: np.ndarray, entropies: np.ndarray) -> Children:
    """Return the first of the most probable tokens ``[n, columns]`` after each of n nodes as its child, the others as
    alternatives."""
    beside = Beside(tokens[:, 1:], log_probs[:, 1:]) if tokens.shape[1] > 1 else None
    return Children(tokens[:, :1], log_probs[:, :1], entropies, None, beside)


def drawn_child(
    logits: Tensor,
    extra: Tensor | None,
    ids: np.ndarray | None,
    sampling: tuple[float, float],
    top_k: int | None,
    u: float,
) -> Children:
    """Return the token that ``u`` in [0, 1) draws from one row of logits, with its proposal.

    Args:
        logits, extra, ids: as of ``most_probable_child``, of one row.
        sampling: temperature and top_p.
        top_k: see ``ChainDrafter``.
    """
    q = probabilities((logits if extra is None else torch.cat([logits, extra], -1))[0], *sampling)
    proposal = Proposal(np.arange(len(q)) if ids is None else ids, q)
    if top_k is not None:
        proposal = proposal.truncated(top_k)
    token = proposal.draw(u)
    entropy = -np.sum(q * np.log(np.maximum(q, 1e-300)))
    return Children(np.array([[token]]), np.log([[proposal.probability(token)]]), np.array([entropy]), proposal)
