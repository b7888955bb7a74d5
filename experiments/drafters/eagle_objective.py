"""The objective of training an EAGLE-3 head: training-time test (arXiv 2503.01840, section 3). The head is unrolled
over its own outputs, so that deep levels read in training what they read in use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.experiments.drafters.batches import Batch, sampled
from spec_envs.experiments.drafters.distilled import DraftVocabulary, Scores
from spec_envs.experiments.drafters.head_rows import HeadRows, attended

STEP_DECAY = 0.8  # weight of an unrolled step relative to the step before


class Unrolled(HeadRows):
    """A head of one layer that is unrolled over its own outputs.

    Row t starts from the target's hidden state at position t. At step i it has read tokens t+1 … t+1+i of the text and
    its own output of step i−1, and predicts token t+2+i. After step 0 a row attends to the keys of step 0 up to its own
    and to its own later keys, but to no later keys of other rows. So deeper steps can be computed for a random share of
    the rows, which is a much cheaper sample and nearly as good, and of the rows of a prompt only keys are needed.
    """

    def forward(self, batch: Batch, steps: int, first: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """Yield the normed output of each step.

        Args:
            first: rows whose output is wanted at step 0, ascending, ``[m]``.
            rows: those of them that take the other steps, ascending, ``[n]``.

        Yields:
            ``[m, hidden]`` at step 0, then ``[n, hidden]``.
        """
        layer, states = self.head.midlayer, self.head.fc(batch.features).float()
        counts = torch.bincount(batch.text[first], minlength=len(batch.lengths)).tolist()
        hidden, at, before = (
            states,
            torch.arange(len(batch.ids), device=batch.ids.device),
            list[tuple[Tensor, Tensor]](),
        )
        for step in range(steps):
            entering = self.entering(batch.ids[(at + 1 + step).clamp(max=len(batch.ids) - 1)], hidden)
            rope = self.rope.at(batch.position[at] + step)
            keys, values = self.keys_and_values(layer, entering, rope)
            if step == 0:
                context = keys, values
                entering, rope, hidden, at = entering[first], (rope[0][first], rope[1][first]), hidden[first], first
            else:
                before.append((keys, values))
            queries = self.queries(layer, entering, rope)
            hidden = hidden + self.out(layer, attended(batch, queries, at, counts, context, before))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            yield self.head.norm(hidden)
            if step == 0:
                hidden, at = hidden[torch.isin(first, rows)], rows
                counts = torch.bincount(batch.text[rows], minlength=len(batch.lengths)).tolist()


class EagleObjective:
    """Cross-entropy to the target's distribution: over the answers and a share of the prompts at the first step, and over
    a share of the answers at later steps.

    Args:
        head: what is trained.
        target: the model for which it drafts.
        positions: tokens of the longest text, and the levels that are drafted after it.
        dtype: in which matrices are multiplied.
    """

    reads_features = True

    def __init__(self, head: EagleHead, target: Transformer, positions: int, dtype: torch.dtype):
        self.trained, self.device = head, target.device
        self.model = Unrolled(head, target.embedding_weight().float(), positions)
        self.vocabulary = DraftVocabulary(target.output_weight(), head.draft_ids, dtype)

    def __call__(
        self, batch: Batch, steps: int, share: float, generator: torch.Generator, prompts: float = 0.0
    ) -> Scores:
        """Return loss and acceptance; see ``Objective``."""
        vocabulary, answered = self.vocabulary.of(batch), batch.drafting(0)
        first, rows = batch.trained(0, prompts, generator), sampled(answered, share, generator)
        scores = Scores(torch.zeros((), device=self.device), *torch.zeros(2, steps, device=self.device))
        alive = torch.ones(len(batch.ids), dtype=torch.bool, device=self.device)  # rows whose chain so far is right
        with self.vocabulary.autocast():
            for step, hidden in enumerate(self.model(batch, steps, first, rows)):
                at = rows if step else first
                drafting = batch.left[at] >= 2 + step
                at = at[drafting]
                loss, right = self.vocabulary.compared(batch, vocabulary, hidden[drafting], at + 1 + step)
                scores.loss = scores.loss + STEP_DECAY**step * loss / max(1, len(at))
                counted = answered[at]
                alive[at] &= right
                scores.survived[step], scores.counted[step] = alive[at][counted].sum(), counted.sum()
        return scores
