"""What the benchmark checks of traces: that a replay is the live decoder, how fast it is, and what recording costs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from agents.random import RandomAgent
from experiments.arms import Encoded
from experiments.benchmark_arms import Problem
from experiments.live import decoder_for
from spec_envs.controls import Policy
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.recorder import record, watched
from spec_envs.decoding.replay import replayed
from spec_envs.decoding.trace import Trace
from spec_envs.generate import Generation

RANDOM_SEED = 11


def equality(trace: Trace, problem: Problem, table: CostTable, cycles: int) -> dict[str, Any]:
    """Random play on held-out texts, live and replayed: accepted tokens of every cycle, and seconds as priced and timed."""
    live_decoder = decoder_for({**problem.env, "trace": None}, problem.control())
    detokenize = live_decoder.detokenize
    replay_decoder = replayed(trace, PricedClock(table), live_decoder.max_depth, detokenize)
    actors = {
        name: Policy(c, RandomAgent(c, seed=RANDOM_SEED)) for name in ("live", "replay") for c in [problem.control()]
    }
    near, compared, wrong, tied, decisions = trace.ties(), 0, 0, 0, 0
    spent = {"live": 0.0, "replay": 0.0}
    texts = trace.of_split("test")
    for i in texts * (1 + cycles // (20 * len(texts))):
        text = Encoded(trace.texts[i].task, trace.texts[i].prompt)
        runs = {}
        for name, decoder in (("live", live_decoder), ("replay", replay_decoder)):
            rng = np.random.default_rng(i)
            runs[name] = Generation(
                decoder, actors[name], text.ids, problem.env["max_new_tokens"], rng, text.task
            ).run()
            spent[name] += runs[name].seconds
        decisions += len(runs["live"].actions)
        at = int(trace.starts[i])
        for mine, theirs in zip(runs["live"].cycles, runs["replay"].cycles, strict=False):
            compared += 1
            if mine.tokens != theirs.tokens or mine.accepted != theirs.accepted:
                if near[at : at + mine.emitted + 1].any():
                    tied += 1
                else:
                    wrong += 1
                break
            at += mine.emitted
        if compared >= cycles:
            break
    return {
        "replay_equals_live": {
            "cycles": compared,
            "mismatches": wrong,
            "ties": tied,
            "priced_over_timed": spent["replay"] / spent["live"],
        },
        "live_steps_per_s": decisions / spent["live"],
    }


def speeds(problem: Problem, live: float, count: int = 4096, steps: int = 50) -> dict[str, float]:
    """Environment steps per second in NumPy, which uses one core, and how many times the live environment that is."""
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
    return {"replay_steps_per_s": rate, "replay_over_live": rate / live}


def recording_cost(trace: Trace, decoder: Any) -> dict[str, float]:
    """Seconds of recording a position, and of a live cycle that drafts all there is and verifies the most that is offered."""
    text = next(text for text in trace.texts if text.split == "train")
    begin = time.perf_counter()
    columns = record(watched(decoder), text.prompt, trace.manifest.max_new_tokens)
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
    return {"position_seconds": position, "full_cycle_seconds": float(np.median(cycles))}
