"""How a number is made: arms run interleaved over the same prompts, ratios with paired bootstrap intervals."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from tqdm import tqdm
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from spec_envs.controls import Policy
from spec_envs.decoding.checkpoints import model_folder
from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.files import whole
from spec_envs.generate import Generation

PACKAGES = ("torch", "transformers", "gymnasium", "stable-baselines3", "sb3-contrib", "numpy")


@dataclass(frozen=True)
class Encoded:
    """A prompt ready to decode."""

    task: str
    ids: list[int]


@dataclass
class Sample:
    """One prompt under one arm. ``tokens`` and ``seconds`` leave out the first token, which is the prefill's."""

    prompt: Encoded
    tokens: int
    seconds: float
    prefill_seconds: float
    ids: list[int]
    cycles: int = 0
    accepted: int = 0
    verified: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    actions: list[int] = field(default_factory=list)


Arm = Callable[[Encoded, int, int], Sample]
"""From a prompt, max_new_tokens and a seed to a sample."""


def decoded(decoder: Decoder, policy: Policy | None) -> Arm:
    """This project's decoder under a policy; None decodes plainly."""

    def run(prompt: Encoded, max_new_tokens: int, seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        done = Generation(decoder, policy, prompt.ids, max_new_tokens, rng).run()
        cycles = done.cycles
        parts = {part: sum(c.seconds[part] for c in cycles) for part in ("draft", "verify", "policy")}
        return Sample(
            prompt=prompt,
            tokens=len(done.tokens) - 1,
            seconds=done.seconds,
            prefill_seconds=done.prefill_seconds,
            ids=list(done.tokens),
            cycles=len(cycles),
            accepted=sum(c.accepted for c in cycles),
            verified=sum(c.verified for c in cycles),
            parts=parts,
            actions=done.actions,
        )

    return run


def plain_decoder(decoder: Decoder) -> Decoder:
    """A decoder for the same target and sampling that never drafts."""
    verifier = decoder.verifier
    plain = LocalVerifier(verifier.target, (), verifier.temperature, verifier.top_p)
    clock = decoder.clock if decoder.clock.priced else WallClock(verifier.target.device)
    return Decoder(plain, None, clock, decoder.eos)


class FirstToken(StoppingCriteria):
    """Never stops; notes when the first token was there."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def transformers_arm(target: str, decoder: Decoder) -> Arm:
    """Hugging Face's ``generate`` on the same weights, dtype and device."""
    verifier = decoder.verifier
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(target), dtype=verifier.target.dtype)
    model.to(verifier.target.device).eval()
    sampling: dict[str, Any] = {"do_sample": False}
    if verifier.temperature:
        sampling = {"do_sample": True, "temperature": verifier.temperature, "top_p": verifier.top_p, "top_k": 0}

    def run(prompt: Encoded, max_new_tokens: int, seed: int) -> Sample:
        torch.manual_seed(seed)
        first = FirstToken()
        ids = torch.tensor([prompt.ids], device=model.device)
        begin = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(decoder.eos),
            stopping_criteria=StoppingCriteriaList([first]),
            **sampling,
        )
        tokens = out[0, ids.shape[1] :].tolist()
        end = time.perf_counter()
        return Sample(prompt, len(tokens) - 1, end - first.at, first.at - begin, tokens, cycles=len(tokens) - 1)

    return run


def run_arms(
    arms: dict[str, Arm], prompts: Sequence[Encoded], max_new_tokens: int, desc: str, seed: int = 0
) -> dict[str, list[Sample]]:
    """Every arm on every prompt, prompt by prompt in rotating order, after one warm-up each.

    A prompt on which an arm has nothing to do (the first token ends the text) is left out for all.
    """
    names = list(arms)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    with tqdm(total=len(names) * (len(prompts) + 1), desc=desc, unit="text") as bar:
        for name in names:
            arms[name](prompts[0], min(16, max_new_tokens), seed)
            bar.update()
        for i, prompt in enumerate(prompts):
            turn = {}
            for name in names[i % len(names) :] + names[: i % len(names)]:
                turn[name] = arms[name](prompt, max_new_tokens, seed + i)
                bar.update()
            if all(sample.tokens > 0 for sample in turn.values()):
                for name, sample in turn.items():
                    samples[name].append(sample)
    return samples


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
        the best one. Near-ties flip in bfloat16; in float32 both are 0.
    """
    target, wrong, total, gap = decoder.verifier.target, 0, 0, 0.0
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


def machine(decoder: Decoder) -> dict[str, Any]:
    """Processor, threads, dtype, versions and revision, for the head of a table."""
    target = decoder.verifier.target
    return {
        "processor": processor(target.device),
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "clock": decoder.clock.table.name if hasattr(decoder.clock, "table") else "wall",
        "versions": versions(),
        "revision": revision(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def processor(device: torch.device) -> str:
    """Name of the device that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def revision() -> str:
    """Git revision of the checkout, or ``"unknown"`` outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")
