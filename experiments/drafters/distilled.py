"""The loss of every drafter: cross-entropy to the target's distribution over the draft vocabulary.

In training the draft vocabulary is the shortlist and every token of the batch. The output rows are the target's and stay
fixed, so a drafter that learns to predict a token does not need it in the shortlist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spec_envs.experiments.drafters.batches import Batch

CHUNK = 128  # rows whose logits are held at a time, so that they stay in the processor's cache


@dataclass
class Scores:
    """The figures of a batch.

    Attributes:
        loss: a scalar.
        survived: for each length of a chain, the number of rows from which that many tokens in a row are right.
        counted: the number of all rows for each length.
    """

    loss: Tensor
    survived: Tensor
    counted: Tensor


class Distilled(torch.autograd.Function):
    """Cross-entropy of rows to the target's distribution, summed, and the most probable token of each.

    Logits and their gradients are computed for ``CHUNK`` rows at a time and never kept: the output rows are fixed, so
    only the gradient of the hidden states is needed later.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, final: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        loss, best = torch.zeros((), device=hidden.device), []
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(hidden), CHUNK):
            part = slice(begin, begin + CHUNK)
            wanted = F.linear(final[part], rows).float().softmax(-1)
            logits = F.linear(hidden[part], rows).float()
            best.append(logits.argmax(-1))
            log_probs = logits.log_softmax(-1)
            loss -= torch.dot(wanted.flatten(), log_probs.flatten())
            if gradient is not None:
                gradient[part] = log_probs.exp_().sub_(wanted).to(rows.dtype) @ rows
        ctx.save_for_backward(gradient)
        index = torch.cat(best) if best else torch.empty(0, dtype=torch.long, device=hidden.device)
        ctx.mark_non_differentiable(index)
        return loss, index

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None, None


class DraftVocabulary:
    """The tokens that a drafter drafts.

    Args:
        output_head: the target's output rows ``[vocab, hidden]``.
        shortlist: ids that are drafted in any text.
        dtype: in which matrices are multiplied.
    """

    def __init__(self, output_head: Tensor, shortlist: Tensor, dtype: torch.dtype):
        self.output_head, self.dtype = output_head.to(dtype), dtype
        self.listed = torch.zeros(len(output_head), dtype=torch.bool, device=output_head.device)
        self.listed[shortlist.to(output_head.device)] = True

    def autocast(self) -> torch.autocast:
        """Return the context in which matrices are multiplied in ``dtype``."""
        return torch.autocast(self.output_head.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the ids of the shortlist and of the batch, and their output rows."""
        members = self.listed.clone()
        members[batch.ids] = True
        ids = members.nonzero()[:, 0]
        return ids, self.output_head[ids]

    def compared(
        self, batch: Batch, vocabulary: tuple[Tensor, Tensor], hidden: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compare predictions with the target's.

        Args:
            vocabulary: of the batch.
            hidden: normed outputs of the drafter, ``[n, hidden]``.
            at: the place in the batch of the last token that each has read, ``[n]``.

        Returns:
            The summed cross-entropy, and for each row whether its most probable token is the text's and can be drafted:
            it is in the shortlist, or stood in the text before.
        """
        ids, rows = vocabulary
        with torch.autocast(hidden.device.type, enabled=False):
            loss, best = Distilled.apply(  # type: ignore[no-untyped-call]
                hidden.to(self.dtype), batch.final[at].to(self.dtype), rows
            )
        following = batch.ids[at + 1]
        known = self.listed[following] | (batch.first[at + 1] <= batch.position[at])
        return loss, (ids[best] == following) & known


class Objective(Protocol):
    """Scores a drafter on a batch.

    Attributes:
        trained: the drafter's module.
        device: where it is.
        reads_features: whether it reads the hidden states of the captured layers.
        vocabulary: what it drafts.
    """

    device: torch.device
    reads_features: bool
    vocabulary: DraftVocabulary

    @property
    def trained(self) -> nn.Module: ...

    def __call__(self, batch: Batch, steps: int, share: float, generator: torch.Generator, prompts: float) -> Scores:
        """Return loss and acceptance of chains of 1 to ``steps`` tokens.

        Args:
            share: share of the rows of the answers for which steps after the first are computed.
            generator: draws rows.
            prompts: share of the other rows that are trained, too.
        """
