"""Losses that train an exit, row by row: pure functions of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reinforce(
    logits: Tensor, tokens: Tensor, rewards: Tensor, baseline: float, behaviour: Tensor | None = None
) -> Tensor:
    """Return −(r − b) · log π(t|h) ``[n]``, whose expected gradient is that of −E[r] (Williams 1992).

    Rejected tokens count as much as accepted ones. Tokens that an earlier policy drew are weighted by how
    much more probable they have become, π / π_behaviour.

    Args:
        logits: of the policy, ``[n, vocab]``.
        tokens, rewards: the drawn tokens, and 1 where one was accepted, else 0, ``[n]``.
        baseline: a number that does not depend on these tokens.
        behaviour: log-probabilities with which they were drawn, ``[n]``; None is those of this policy.
    """
    log_probabilities = F.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
    weight = torch.ones_like(rewards) if behaviour is None else (log_probabilities.detach() - behaviour).exp()
    return -weight * (rewards - baseline) * log_probabilities


def expected_acceptance(
    logits: Tensor, verifier_logits: Tensor, temperature: float = 0.0, top_p: float = 1.0
) -> Tensor:
    """Return the chance ``[n]`` that the verifier accepts the next draft: exact, because its distribution is known.

    Greedily it is π(a*), a* being the verifier's most probable token; when both draw, at the same temperature and from
    their nuclei, it is Σ min(p, π) (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6).

    Args:
        logits, verifier_logits: ``[n, vocab]``.
        temperature, top_p: at which both draw; 0 is greedy.
    """
    if temperature == 0:
        return logits.softmax(-1).gather(1, verifier_logits.argmax(-1, keepdim=True))[:, 0]
    return torch.minimum(*(nucleus((x / temperature).softmax(-1), top_p) for x in (logits, verifier_logits))).sum(-1)


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Return the smallest sets of mass ``top_p`` of distributions ``[n, vocab]``, normalised."""
    if top_p == 1:
        return p
    ordered, index = p.sort(dim=-1, descending=True, stable=True)
    dropped = (ordered.cumsum(-1) - ordered >= top_p).detach()
    kept = p.masked_fill(torch.zeros_like(dropped).scatter(-1, index, dropped), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def distillation(logits: Tensor, verifier_logits: Tensor) -> Tensor:
    """Return KL(verifier ‖ policy) in nats, ``[n]``."""
    wanted = verifier_logits.log_softmax(-1)
    return F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)


def masked_cross_entropy(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return −log π(t) where the mask is 1, ``[n]``."""
    return F.cross_entropy(logits, tokens.clamp(min=0), reduction="none") * mask
