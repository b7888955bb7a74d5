"""The objective of training a parallel head (P-EAGLE, arXiv 2602.01469): all positions of a block in one pass.

A position of a text and the mask rows after it are what ``ParallelDrafter`` reads in one forward. Deep mask rows are
sampled more rarely than shallow ones, as in PARD (arXiv 2504.18583), in place of a smaller weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec_envs.decoding.drafters.eagle.head import EagleHead, EagleLayer
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.experiments.drafters.batches import Batch, sampled
from spec_envs.experiments.drafters.distilled import DraftVocabulary, Scores
from spec_envs.experiments.drafters.eagle_objective import STEP_DECAY
from spec_envs.experiments.drafters.head_rows import HeadRows, attended


class Blocks(HeadRows):
    """A parallel head, applied to texts and to mask rows.

    The mask row of depth d of row t, its anchor, reads the mask token and ``mask_hidden`` at position t + d and predicts
    token t + 2 + d. It attends to the text up to its anchor, and to its anchor's mask rows up to its own.
    """

    def forward(self, batch: Batch, first: Tensor, anchors: Tensor, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed outputs of rows of the texts, ``[m, hidden]``, and of mask rows, ``[n, hidden]``.

        Args:
            first: the rows of the texts whose output is wanted, ascending, ``[m]``.
            anchors, depths: of the mask rows, ascending, ``[n]``.
        """
        head, config = self.head, self.head.config
        following = batch.ids.roll(-1)
        hidden, mask = head.fc(batch.features).float(), head.fc(head.mask_hidden[0]).float()
        token = torch.full((1,), head.variant.mask_token or 0, device=batch.ids.device)
        x, y = self.entering(following, hidden), self.entering(token, mask)  # all mask rows enter as one
        masks, rope = mask.expand(len(anchors), -1), self.rope.at(batch.position)
        rope_of_masks = self.rope.at(batch.position[anchors] + depths)
        layers = [head.midlayer, *(head.layers.children() if config.num_hidden_layers > 1 else ())]
        wanted = torch.arange(len(batch.ids), device=batch.ids.device)
        for i, layer in enumerate(layers):
            if i:
                x, y = layer.input_layernorm(hidden), layer.input_layernorm(masks)
            context, blocks = self.keys_and_values(layer, x, rope), self.keys_and_values(layer, y, rope_of_masks)
            if i + 1 == len(layers):
                x, hidden, wanted = x[first], hidden[first], first
            counts = torch.bincount(batch.text[wanted], minlength=len(batch.lengths)).tolist()
            queries = self.queries(layer, x, self.rope.at(batch.position[wanted]))
            hidden = self.fed(layer, hidden, attended(batch, queries, wanted, counts, context, ()))
            queries = self.queries(layer, y, rope_of_masks)
            masks = self.fed(layer, masks, block_attended(batch, queries, anchors, depths, context, blocks))
        return head.norm(hidden), head.norm(masks)

    def fed(self, layer: EagleLayer, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Return the output of a layer from its input and its mixed values."""
        hidden = hidden + self.out(layer, mixed)
        fed: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return fed


def block_attended(
    batch: Batch,
    queries: Tensor,
    anchors: Tensor,
    depths: Tensor,
    context: tuple[Tensor, Tensor],
    blocks: tuple[Tensor, Tensor],
) -> Tensor:
    """Return the mixed values of mask rows, ``[n, heads, d]``.

    Args:
        queries: of the mask rows ``[n, heads, d]``.
        anchors, depths: of the mask rows ``[n]``, ascending.
        context: keys and values of the texts, ``[N, heads, d]``.
        blocks: keys and values of the mask rows; one row of values stands for all.
    """
    counts = torch.bincount(batch.text[anchors], minlength=len(batch.lengths)).tolist()
    block_keys, block_values = (part.expand(len(anchors), -1, -1) for part in blocks)
    mixed = []
    masks = zip(*(part.split(counts) for part in (queries, block_keys, block_values, anchors, depths)), strict=True)
    texts = zip(*(part.split(list(batch.lengths)) for part in context), strict=True)
    for (q, keys, values, anchor, depth), (text_keys, text_values) in zip(masks, texts, strict=True):
        k, v = torch.cat([text_keys, keys]).transpose(0, 1), torch.cat([text_values, values]).transpose(0, 1)
        place = torch.arange(len(text_keys), device=anchors.device)
        own = (anchor == anchor[:, None]) & (depth <= depth[:, None])
        seen = torch.cat([place <= batch.position[anchor][:, None], own], -1)
        scores = (q.transpose(0, 1) @ k.transpose(-1, -2)).float().masked_fill(~seen, float("-inf"))
        mixed.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1))
    return torch.cat(mixed)


class ParallelObjective:
    """Cross-entropy to the target's distribution: over the answers and a share of the prompts for the rows of the texts,
    and over the mask rows of a share of the answers' rows.

    Args:
        head: what is trained, with a mask token.
        target: the model for which it drafts.
        positions: tokens of the longest text, and of the block after it.
        dtype: in which matrices are multiplied.
    """

    reads_features = True

    def __init__(self, head: EagleHead, target: Transformer, positions: int, dtype: torch.dtype):
        self.trained, self.device = head, target.device
        self.model = Blocks(head, target.embedding_weight().float(), positions)
        self.vocabulary = DraftVocabulary(target.output_weight(), head.draft_ids, dtype)

    def __call__(
        self, batch: Batch, steps: int, share: float, generator: torch.Generator, prompts: float = 0.0
    ) -> Scores:
        """Return loss and acceptance; see ``Objective``."""
        vocabulary, answered = self.vocabulary.of(batch), batch.drafting(0)
        chosen = sampled(answered, share, generator)
        anchors, depths = self.mask_rows(batch, chosen, steps, generator)
        first = batch.trained(0, prompts, generator)
        with self.vocabulary.autocast():
            hidden, masks = self.model(batch, first, anchors, depths)
            loss, right = self.vocabulary.compared(batch, vocabulary, hidden, first + 1)
            deep_loss, deep_right = self.vocabulary.compared(batch, vocabulary, masks, anchors + depths + 1)
        survived, counted = torch.zeros(2, steps, device=self.device)
        alive = torch.zeros(len(batch.ids), dtype=torch.bool, device=self.device)  # rows whose chain so far is right
        alive[first] = right
        survived[0], counted[0] = (alive & answered).sum(), answered.sum()
        for step in range(1, steps):
            here = depths == step
            alive[anchors[here]] &= deep_right[here]
            survived[step], counted[step] = alive[anchors[here]].sum(), here.sum()
        loss = loss / max(1, len(first)) + STEP_DECAY * deep_loss / max(1, len(chosen))
        return Scores(loss, survived, counted)

    def mask_rows(self, batch: Batch, chosen: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return anchors and depths of the mask rows of the ``chosen`` rows, ascending. In training a row has depth d + 1
        with probability ``STEP_DECAY`` if it has depth d; otherwise it has all depths at which the text goes on."""
        depth = torch.arange(1, steps, device=self.device)
        drawn = torch.rand(len(chosen), len(depth), generator=generator, device=self.device) < STEP_DECAY
        drawn[:, :1] = True
        kept = drawn.cumprod(-1).bool() if self.trained.training else torch.ones_like(drawn)
        row, column = (kept & (batch.left[chosen][:, None] >= 2 + depth)).nonzero(as_tuple=True)
        return chosen[row], depth[column]
