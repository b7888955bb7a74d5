"""What arms are worth: whole-run throughput, ratios with paired bootstrap intervals, and whether the text is right."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from spec_envs.decoding.decoder import Decoder
from spec_envs.experiments.measure.arms import Sample


def throughput(samples: Sequence[Sample]) -> float:
    """Whole-run tokens over whole-run seconds."""
    return sum(s.tokens for s in samples) / sum(s.seconds for s in samples)


def ratio(a: Sequence[Sample], b: Sequence[Sample]) -> dict[str, float]:
    """Throughput of ``a`` over that of ``b`` with a 95 % interval by paired bootstrap over prompts."""

    def statistic(an: Any, at: Any, bn: Any, bt: Any, axis: int = -1) -> Any:
        return (an.sum(axis) / at.sum(axis)) / (bn.sum(axis) / bt.sum(axis))

    columns = [np.array([getattr(s, key) for s in arm], float) for arm in (a, b) for key in ("tokens", "seconds")]
    value = throughput(a) / throughput(b)
    if len(a) < 2 or a is b:
        return {"value": value, "low": value, "high": value}
    interval = bootstrap(
        columns, statistic, paired=True, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return {"value": value, "low": float(interval.low), "high": float(interval.high)}


def summary(samples: dict[str, list[Sample]], references: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per arm: tokens per second, ratios to the reference arms, emitted per cycle, acceptance, share by part."""
    rows = {}
    for name, arm in samples.items():
        cycles, verified = sum(s.cycles for s in arm), sum(s.verified for s in arm)
        rows[name] = {
            "tokens_per_second": throughput(arm),
            **{f"over_{reference}": ratio(arm, samples[reference]) for reference in references},
            "emitted_per_cycle": sum(s.tokens for s in arm) / max(1, cycles),
            "accepted_per_verified": sum(s.accepted for s in arm) / verified if verified else 0.0,
            "verified_per_cycle": verified / max(1, cycles),
            "prefill_seconds": sum(s.prefill_seconds for s in arm),
            "seconds": sum(s.seconds for s in arm),
            "parts": {part: sum(s.parts[part] for s in arm) for part in arm[0].parts},
            "prompts": len(arm),
        }
    return rows


def with_aa_check(measure: Callable[[int], dict[str, Any]], prompts: int) -> dict[str, Any]:
    """``measure(prompts)``; where plain decoding run twice differs from itself, once more with twice the prompts.

    The first try is kept under ``first_try``.
    """
    results = measure(prompts)
    if aa_agrees(results):
        return results
    print("plain decoding differs from itself (A/A): measuring once more with twice the prompts", file=sys.stderr)
    return measure(2 * prompts) | {"first_try": results}


def aa_agrees(results: dict[str, Any]) -> bool:
    """Whether the A/A interval of a table contains 1."""
    interval = results["arms"]["plain again"]["over_plain"]
    return interval["low"] <= 1 <= interval["high"]


def same_text(a: Sequence[Sample], b: Sequence[Sample]) -> float:
    """Share of the prompts on which two arms emitted the same tokens."""
    return statistics.fmean(x.ids == y.ids for x, y in zip(a, b, strict=True))


def by_task(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples by task, in order of first appearance."""
    tasks: dict[str, list[Sample]] = {}
    for sample in samples:
        tasks.setdefault(sample.prompt.task, []).append(sample)
    return tasks


@torch.inference_mode()
def divergences(decoder: Decoder, samples: Sequence[Sample]) -> dict[str, float]:
    """Emitted tokens that are not the target's argmax when their text is read in one forward.

    Returns:
        ``per_1000``: how many in a thousand, and ``largest_gap``: the most that the logit of such a token lies below
        the best one. Near-ties flip in bfloat16; in int8 and float32 both are 0.
    """
    target, wrong, total, gap = decoder.local.target, 0, 0, 0.0
    for sample in samples:
        prompt = sample.prompt.ids
        ids = torch.tensor([prompt + sample.ids[:-1]], device=target.device)
        positions = torch.arange(ids.shape[1], device=target.device)[None]
        hidden, _ = target.forward(target.embed(ids), target.cache(ids.shape[1]), positions)
        logits = target.head(hidden[0, len(prompt) - 1 :]).float()
        emitted = torch.tensor(sample.ids, device=target.device)
        gaps = logits.max(-1).values - logits.gather(-1, emitted[:, None])[:, 0]
        wrong += int((gaps > 0).sum())
        total += len(emitted)
        gap = max(gap, float(gaps.max()))
    return {"per_1000": 1000 * wrong / max(1, total), "largest_gap": gap}
