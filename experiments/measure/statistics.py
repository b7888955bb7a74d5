"""Statistics of samples: throughput, ratios with paired bootstrap intervals, and agreement of texts."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from scipy.stats import bootstrap, trim_mean
from torch import Tensor

from spec_envs.decoding.clock import PARTS, CostTable
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.experiments.measure.arms import Sample
from spec_envs.experiments.measure.results import Comparison, Divergence, Interval, Row

LOG = logging.getLogger(__name__)
C = TypeVar("C", bound=Comparison)
RESAMPLES = 2000  # of texts and seeds


def throughput(samples: Sequence[Sample]) -> float:
    """Return the tokens per second over all samples."""
    return sum(s.tokens for s in samples) / sum(s.seconds for s in samples)


def ratio(a: Sequence[Sample], b: Sequence[Sample]) -> Interval:
    """Return the ratio of the throughputs of ``a`` and ``b``, with a 95 % interval by paired bootstrap over prompts."""

    def statistic(an: np.ndarray, at: np.ndarray, bn: np.ndarray, bt: np.ndarray, axis: int = -1) -> np.ndarray:
        over: np.ndarray = (an.sum(axis) / at.sum(axis)) / (bn.sum(axis) / bt.sum(axis))
        return over

    columns = [
        np.array(column, float) for arm in (a, b) for column in ([s.tokens for s in arm], [s.seconds for s in arm])
    ]
    value = throughput(a) / throughput(b)
    if len(a) < 2 or a is b:
        return Interval(value, value, value)
    interval = bootstrap(
        columns, statistic, paired=True, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(value, float(interval.low), float(interval.high))


def over_texts_and_seeds(arm: np.ndarray, other: np.ndarray) -> Interval:
    """Return the ratio of the throughput of an arm to that of another one on the same texts, with a 95 % interval by
    hierarchical bootstrap: texts are drawn anew, the same ones for both, and the seeds of each.

    Args:
        arm, other: seconds of every text, ``[seeds, texts]``; one seed for what is not trained. Over several seeds the
            ratio is the interquartile mean.
    """
    rng, texts = np.random.default_rng(0), arm.shape[1]

    def rate(seconds: np.ndarray) -> float:
        return float(trim_mean(1 / seconds.sum(1), 0.25))

    def drawn(seconds: np.ndarray, chosen: np.ndarray) -> float:
        seeds = rng.integers(len(seconds), size=len(seconds))
        return rate(seconds[seeds][:, chosen])

    ratios = []
    for _ in range(RESAMPLES):
        chosen: np.ndarray = rng.integers(texts, size=(texts,))
        ratios.append(drawn(arm, chosen) / drawn(other, chosen))
    low, high = np.percentile(ratios, (2.5, 97.5)).tolist()
    return Interval(rate(arm) / rate(other), low, high)


def summary(samples: dict[str, list[Sample]], references: Sequence[str]) -> dict[str, Row]:
    """Return a row for each arm, compared with the reference arms."""
    rows = {}
    for name, arm in samples.items():
        cycles, verified = sum(s.cycles for s in arm), sum(s.verified for s in arm)
        rows[name] = Row(
            tokens_per_second=throughput(arm),
            over={reference: ratio(arm, samples[reference]) for reference in references},
            emitted_per_cycle=sum(s.tokens for s in arm) / max(1, cycles),
            accepted_per_verified=sum(s.accepted for s in arm) / verified if verified else 0.0,
            verified_per_cycle=verified / max(1, cycles),
            prefill_seconds=sum(s.prefill_seconds for s in arm),
            seconds=sum(s.seconds for s in arm),
            parts={part: sum(s.parts[part] for s in arm) for part in arm[0].parts},
            prompts=len(arm),
        )
    return rows


def at_prices(sample: Sample, table: CostTable) -> Sample:
    """Return a sample with the seconds that a cost table charges for its forwards. Decisions and a simulated network keep
    the seconds that they were charged, which are not measured text by text either; what a processor does besides costs
    nothing."""
    parts = dict.fromkeys(PARTS, 0.0) | {part: sample.parts[part] for part in ("network", "policy")}
    for (part, rows), times in sample.forwards.items():
        parts[part.partition(":")[0]] += times * table.seconds(part, rows)
    prefill = parts.pop("prefill")
    return replace(sample, seconds=sum(parts.values()), prefill_seconds=prefill, parts=parts)


def with_aa_check(measure: Callable[[int], C], prompts: int) -> C:
    """Return ``measure(prompts)``. If an arm differs from itself there, measure again with twice as many
    prompts and keep the first results as ``first_try``."""
    results = measure(prompts)
    if results.agrees:
        return results
    LOG.warning("an arm differs from itself (A/A): measuring again with twice as many prompts")
    again = measure(2 * prompts)
    again.first_try = results
    return again


def same_text(a: Sequence[Sample], b: Sequence[Sample]) -> float:
    """Return the share of the prompts on which two arms emitted the same tokens."""
    return statistics.fmean(x.ids == y.ids for x, y in zip(a, b, strict=True))


def by_task(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Return the samples by task, in order of first appearance."""
    tasks: dict[str, list[Sample]] = {}
    for sample in samples:
        tasks.setdefault(sample.prompt.task, []).append(sample)
    return tasks


def divergence(decoder: Decoder, samples: Sequence[Sample], plain: Sequence[Sample]) -> Divergence:
    """Compare emitted tokens with the argmax of a single forward of the target over their text, and with those of plain
    decoding. In int8, q4 and float32 they are equal; in bfloat16 near-ties may flip."""
    gaps = torch.cat([behind_argmax(decoder.local.target, sample) for sample in samples])
    return Divergence(1000 * float((gaps > 0).float().mean()), float(gaps.max()), same_text(samples, plain))


@torch.inference_mode()
def behind_argmax(target: Transformer, sample: Sample) -> Tensor:
    """Return how far the logit of each emitted token ``[tokens]`` lies below the highest one, in a single forward of a
    target over the text; 0 where the token is the target's own choice."""
    prompt = sample.prompt.ids
    ids = torch.tensor([prompt + sample.ids[:-1]], device=target.device)
    positions = torch.arange(ids.shape[1], device=target.device)[None]
    hidden, _ = target.forward(target.embed(ids), target.cache(ids.shape[1]), positions)
    logits = target.head(hidden[0, len(prompt) - 1 :]).float()
    emitted = torch.tensor(sample.ids, device=target.device)
    behind: Tensor = logits.max(-1).values - logits.gather(-1, emitted[:, None])[:, 0]
    return behind
