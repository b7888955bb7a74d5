"""Compare the replay of several drafters' traces with live decoding, by random choices between them."""

from __future__ import annotations

import itertools

import numpy as np

from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.controls import Policy
from spec_envs.decoding.clock import PricedClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.experiments.choosing.references import Setting
from spec_envs.generation import Generation

CYCLES = 300  # that are compared
SEED = 11


def replay_equals_live(setting: Setting, live: Decoder, cycles: int = CYCLES) -> bool:
    """Return whether the same random actions lead to the same tokens, accepted tokens and priced forwards, live and
    replayed, on recorded test texts.

    A text that differs where rounding decides the target's choice counts up to there.

    Args:
        live: decoder over the models.
        cycles: fewest cycles to compare; as many texts are decoded at most.
    """
    trace, near, compared = setting.trace, setting.trace.ties(), 0
    replay = trace.decoder(setting.control, PricedClock(setting.table))
    for number, i in enumerate(itertools.islice(itertools.cycle(trace.of_split("test")), cycles)):
        mine, theirs = (at_random(decoder, setting, i, number) for decoder in (live, replay))
        row, tied = int(trace.starts[i]), False
        for one, other in zip(mine.cycles, theirs.cycles, strict=False):
            if (one.tokens, one.accepted, one.verified) != (other.tokens, other.accepted, other.verified):
                tied = bool(near[row : row + one.emitted + 1].any())
                if not tied:
                    return False
                break
            row, compared = row + one.emitted, compared + 1
        made = {forward: times for forward, times in live.clock.forwards.items() if forward[0] != "prefill"}
        priced = sum(times * setting.table.seconds(*forward) for forward, times in made.items())
        if not tied and not np.isclose(priced, theirs.seconds):
            return False
        if compared >= cycles:
            break
    return compared > 0


def at_random(decoder: Decoder, setting: Setting, text: int, seed: int) -> Generation:
    """Return a recorded text that was decoded with random actions."""
    control, recorded = setting.control, setting.trace.texts[text]
    policy = Policy(control, RandomAgent(control, seed=SEED + seed))
    rng = np.random.default_rng(0)
    return Generation(decoder, policy, recorded.prompt, setting.tokens, rng, recorded.task).run()
