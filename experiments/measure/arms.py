"""Arms of a comparison, which are interleaved prompt by prompt in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from spec_envs.controls import Policy
from spec_envs.decoding.engine import Engine
from spec_envs.experiments.command import Announce, about
from spec_envs.generation import Generation
from spec_envs.network.channel import SimulatedChannel
from spec_envs.network.edge.linked import LinkedDecoder
from spec_envs.network.link import LinkState


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids, and its task."""

    task: str
    ids: list[int]


@dataclass
class Sample:
    """The measurements of one prompt under one arm.

    Attributes:
        tokens: number of emitted tokens, except the first one (it belongs to the prefill) and those that no target
            verified.
        seconds: seconds of decoding, without the prefill.
        ids: token ids of the whole answer.
        scored: drafted tokens that the target verified: the accepted ones plus the first rejected one of each chain.
        parts: seconds by part of a cycle.
        actions: the agent's decisions.
        lengths: drafted candidates of each cycle.
        states: state of a simulated link in each cycle.
        forwards: number of forwards that were measured, by part and rows, those of the prefill included.
    """

    prompt: Encoded
    tokens: int
    seconds: float
    prefill_seconds: float
    ids: list[int]
    cycles: int = 0
    accepted: int = 0
    scored: int = 0
    verified: int = 0
    parts: dict[str, float] = field(default_factory=dict)
    actions: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    states: list[LinkState] = field(default_factory=list)
    forwards: Mapping[tuple[str, int], int] = field(default_factory=dict)


Arm = Callable[[Encoded, int, int], Sample]
"""Returns the sample of a prompt, given the most new tokens and a seed."""

WARM_UP = 16  # tokens of each arm before anything is measured


def decoded(decoder: Engine, policy: Policy | None) -> Arm:
    """Return the arm of one of this project's decoders under a policy; None decodes plainly."""

    def run(prompt: Encoded, max_new_tokens: int, seed: int) -> Sample:
        rng = np.random.default_rng(seed)
        done = Generation(decoder, policy, prompt.ids, max_new_tokens, rng, prompt.task)
        channel = simulated_channel(decoder)
        states = [channel.used if channel else None for _ in done][1:]  # after each cycle, the state during it
        cycles = done.cycles
        parts = {part: sum(c.seconds[part] for c in cycles) for part in ("draft", "verify", "network", "policy")}
        return Sample(
            prompt=prompt,
            tokens=len(done.tokens) - 1 - sum(c.unverified for c in cycles),
            seconds=done.seconds,
            prefill_seconds=done.prefill_seconds,
            ids=list(done.tokens),
            cycles=len(cycles),
            accepted=sum(c.accepted for c in cycles),
            scored=sum(c.scored for c in cycles),
            verified=sum(c.verified for c in cycles),
            parts=parts,
            actions=done.actions,
            lengths=[c.drafted for c in cycles],
            bytes_up=sum(c.bytes_up for c in cycles),
            bytes_down=sum(c.bytes_down for c in cycles),
            states=[state for state in states if state],
            forwards=dict(decoder.clock.forwards),
        )

    return run


def warm_up(arm: Arm, prompt: Encoded, max_new_tokens: int, seed: int) -> float:
    """Run an arm on the first tokens of an answer, and return the seconds that a whole one would take."""
    began = time.perf_counter()
    sample = arm(prompt, min(WARM_UP, max_new_tokens), seed)
    elapsed = time.perf_counter() - began
    decoding = elapsed * sample.seconds / max(sample.seconds + sample.prefill_seconds, 1e-12)
    return elapsed - decoding + decoding * max_new_tokens / max(1, sample.tokens)


def simulated_channel(decoder: Engine) -> SimulatedChannel | None:
    """Return the channel of the simulated link that a decoder verifies over; None if it verifies over no such link."""
    if isinstance(decoder, LinkedDecoder) and isinstance(decoder.verifier.channel, SimulatedChannel):
        return decoder.verifier.channel
    return None


def run_arms(
    arms: dict[str, Arm],
    prompts: Sequence[Encoded],
    max_new_tokens: int,
    desc: str,
    seed: int = 0,
    quiet: bool = False,
    announce: Announce | None = None,
) -> dict[str, list[Sample]]:
    """Run every arm on every prompt after one warm-up each, prompt by prompt, and return the samples of each arm.

    The order of the arms is drawn anew for every prompt. A prompt whose answer ends with its first token under any arm is left out for all.

    Args:
        desc: label of the progress bar.
        seed: seed of the first prompt; each further prompt adds 1.
        quiet: shows no progress bar.
        announce: is told, after the warm-up, what is measured and about how long that takes.

    Raises:
        ValueError: there are no prompts, or all are left out.
    """
    if not prompts:
        raise ValueError("there are no prompts to run; expected at least one")
    names = list(arms)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    seconds = 0.0
    for name in tqdm(names, desc="warming up", unit="arm", leave=False, disable=quiet):
        seconds += len(prompts) * warm_up(arms[name], prompts[0], max_new_tokens, seed)
    if announce:
        announce(f"measuring {len(names)} arms on {len(prompts)} {desc} in turn ({about(seconds)})")
    with tqdm(total=len(names) * len(prompts), desc=desc, unit="text", disable=quiet) as bar:
        for i, prompt in enumerate(prompts):
            found = {}
            for name in np.random.default_rng([seed, i]).permutation(names).tolist():
                found[name] = arms[name](prompt, max_new_tokens, seed + i)
                bar.update()
            if all(sample.tokens > 0 for sample in found.values()):
                for name, sample in found.items():
                    samples[name].append(sample)
    if not samples[names[0]]:
        raise ValueError(f"no prompt is answered with more than one token within max_new_tokens={max_new_tokens}")
    return samples
