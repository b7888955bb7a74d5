"""Checks of traces: whether a replay equals the live decoder, how fast it is, and what recording costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.controls import Policy
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.decoder import Decoder, over_models
from spec_envs.decoding.traces.recorder import Recorder
from spec_envs.decoding.traces.replay import replayed
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.benchmark.arms import Problem, words
from spec_envs.experiments.benchmark.findings import Equality, RecordingCost, Speeds
from spec_envs.experiments.benchmark.problems import Size
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.generation import Generation

RANDOM_SEED = 11


class Decoded(NamedTuple):
    """A text of a trace that was decoded with random actions; ``text`` is its index."""

    text: int
    cycles: list[Cycle]
    seconds: float
    decisions: int


def decoded_at_random(trace: Trace, problem: Problem, size: Size) -> list[Decoded]:
    """Return held-out texts that were decoded live until they had ``size.cycles`` cycles."""
    control = problem.control()
    decoder = over_models(decoder_for({**problem.env, "trace": None}, control))
    policy, texts = Policy(control, RandomAgent(control, seed=RANDOM_SEED)), trace.of_split(size.held_out)
    found: list[Decoded] = []
    while sum(len(text.cycles) for text in found) < size.cycles:
        found.append(decode(decoder, policy, trace, problem, texts[len(found) % len(texts)]))
    return found


def decode(decoder: Decoder, policy: Policy, trace: Trace, problem: Problem, i: int) -> Decoded:
    """Decode the text of a trace at an index under a policy."""
    text, rng = trace.texts[i], np.random.default_rng(i)
    run = Generation(decoder, policy, text.prompt, problem.env["max_new_tokens"], rng, text.task).run()
    return Decoded(i, run.cycles, run.seconds, len(run.actions))


def equality(trace: Trace, problem: Problem, table: CostTable, live: Sequence[Decoded]) -> Equality:
    """Replay with the same actions what was decoded live, and compare the tokens of every cycle and the seconds."""
    control = problem.control()
    decoder = replayed(trace, PricedClock(table), control.max_depth, words(trace))
    policy = Policy(control, RandomAgent(control, seed=RANDOM_SEED))
    near, compared, wrong, tied, priced = trace.ties(), 0, 0, 0, 0.0
    for timed in live:
        replay = decode(decoder, policy, trace, problem, timed.text)
        priced += replay.seconds
        at = int(trace.starts[timed.text])
        for mine, theirs in zip(timed.cycles, replay.cycles, strict=False):
            compared += 1
            if mine.tokens != theirs.tokens or mine.accepted != theirs.accepted:
                if near[at : at + mine.emitted + 1].any():
                    tied += 1
                else:
                    wrong += 1
                break
            at += mine.emitted
    return Equality(compared, wrong, tied, priced / sum(text.seconds for text in live))


def speeds(problem: Problem, live: Sequence[Decoded], count: int = 4096, steps: int = 50) -> Speeds:
    """Return environment steps per second: of texts that were decoded live, and of ``count`` environments in NumPy."""
    env = problem.environments(count)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(8)]
    for i in range(5):
        env.step(actions[i])
    begin = time.perf_counter()
    for i in range(steps):
        env.step(actions[i % 8])
    rate = count * steps / (time.perf_counter() - begin)
    live_rate = sum(text.decisions for text in live) / sum(text.seconds for text in live)
    return Speeds(live_rate, rate, rate / live_rate)


def recording_cost(trace: Trace, decoder: Decoder) -> RecordingCost:
    """Return the seconds of recording a position, and of a live cycle that drafts and verifies as much as possible."""
    text = next(text for text in trace.texts if text.split == "train")
    begin = time.perf_counter()
    columns = Recorder(decoder).record(text.prompt, trace.manifest.max_new_tokens)
    position = (time.perf_counter() - begin) / len(columns["tokens"])
    decoder.start(text.prompt, trace.manifest.max_new_tokens, np.random.default_rng(0))
    cycles: list[float] = []
    while not decoder.finished and len(cycles) < 5:
        begin = time.perf_counter()
        decoder.begin()
        while decoder.tree.expansions < decoder.max_depth and decoder.expand():
            pass
        decoder.verify(min(decoder.tree.size, 95))
        cycles.append(time.perf_counter() - begin)
    return RecordingCost(position, float(np.median(cycles)))
