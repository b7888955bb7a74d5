"""The quality of each dtype beside float32: of its distributions on given texts, and of its own texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import load_target
from spec_envs.experiments.measure.arms import Encoded, Sample, decoded, run_arms
from spec_envs.experiments.measure.statistics import behind_argmax, same_text, throughput

REFERENCE = "float32"  # the dtype that the others are compared with


@dataclass(frozen=True)
class Quality:
    """The quality of a dtype on texts.

    Attributes:
        perplexity: perplexity of the texts.
        agreement: share of positions at which the most probable token is the same as in float32.
        kl: mean Kullback–Leibler divergence KL(float32 ‖ dtype), in nats per token.
    """

    perplexity: float
    agreement: float
    kl: float


@dataclass(frozen=True)
class PlainText:
    """Plain decoding in a dtype, greedy.

    Attributes:
        own_argmax_share: share of the emitted tokens that are the argmax of float32's forward over the same text.
        divergence: mean Kullback–Leibler divergence KL(float32 ‖ dtype) on the prompts, in nats per token.
        same_text: share of the texts that are those of plain decoding in float32.
    """

    plain_tokens_per_s: float
    own_argmax_share: float
    divergence: float
    same_text: float


class Judge:
    """Compares emitted tokens with the choices of a target, and computes equal texts once."""

    def __init__(self, target: Transformer) -> None:
        self.target = target
        self.judged: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}

    def own_share(self, samples: Sequence[Sample]) -> float:
        """Return the share of the emitted tokens that are the target's argmax, each after the text before it."""
        return sum(map(self._own, samples)) / sum(len(sample.ids) for sample in samples)

    def _own(self, sample: Sample) -> int:
        text = (tuple(sample.prompt.ids), tuple(sample.ids))
        if text not in self.judged:
            self.judged[text] = int((behind_argmax(self.target, sample) == 0).sum())
        return self.judged[text]


def plain_texts(
    decoders: Mapping[str, Decoder],
    prompts: Sequence[Encoded],
    max_new_tokens: int,
    found: Mapping[str, Quality],
) -> dict[str, PlainText]:
    """Decode prompts plainly in every dtype, side by side, and return the speed and the fidelity of each.

    Args:
        decoders: by dtype, one of them float32.
        found: quality of each dtype on the prompts.
    """
    arms = {dtype: decoded(decoder.plain(), None) for dtype, decoder in decoders.items()}
    samples = run_arms(arms, prompts, max_new_tokens, "texts in every dtype")
    judge = Judge(decoders[REFERENCE].local.target)
    return {
        dtype: PlainText(throughput(arm), judge.own_share(arm), found[dtype].kl, same_text(arm, samples[REFERENCE]))
        for dtype, arm in samples.items()
    }


@torch.inference_mode()
def quality(target: str, device: torch.device, dtypes: Sequence[str], texts: Sequence[list[int]]) -> dict[str, Quality]:
    """Return the quality of each dtype, and of float32, on texts of token ids."""
    names = [REFERENCE, *(name for name in dtypes if name != REFERENCE)]
    models = {name: load_target(target, device, name) for name in names}
    sums = {name: [0.0, 0.0, 0.0] for name in names}  # negative log-likelihood, agreement, divergence
    predicted, rows = 0, 0
    for text in texts:
        ids = torch.tensor([text], device=device)
        positions = torch.arange(len(text), device=device)[None]
        reference = torch.empty(0)
        for name, model in models.items():
            hidden, _ = model.forward(model.embed(ids), model.cache(len(text)), positions)
            log_p = model.head(hidden)[0].float().log_softmax(-1)
            reference = log_p if name == REFERENCE else reference
            sums[name][0] -= float(log_p[:-1].gather(1, ids[0, 1:, None]).sum())
            sums[name][1] += float((log_p.argmax(-1) == reference.argmax(-1)).sum())
            sums[name][2] += float((reference.exp() * (reference - log_p)).sum())
        predicted, rows = predicted + len(text) - 1, rows + len(text)
    return {
        name: Quality(math.exp(loss / predicted), same / rows, kl / rows) for name, (loss, same, kl) in sums.items()
    }
