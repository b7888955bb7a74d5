"""Cost curves of this machine: seconds of a target forward and of a drafter forward by rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from spec_envs.decoding.decoder import Decoder

VERIFY_ROWS = (1, 2, 4, 8, 12, 16, 17, 24, 32, 48, 64, 80, 96)  # a row more than a tile of 16 costs a jump
CONTEXT = 256  # rows in the cache when a curve is measured


def cost_curves(decoder: Decoder, rows: Sequence[int] = VERIFY_ROWS, repeats: int = 11) -> dict[str, dict[int, float]]:
    """Seconds by rows of ``verify`` and of ``draft``, behind a text of ``CONTEXT`` tokens.

    The row counts are visited in turn, ``repeats`` times over, so that a machine that drifts bends all of them alike.
    """
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, decoder.verifier.vocab, CONTEXT).tolist()
    sync = decoder.clock.synchronize
    verify: dict[int, list[float]] = {n: [] for n in rows}
    draft: dict[int, list[float]] = {1: [], decoder.tree.width: []}
    eos, decoder.eos = decoder.eos, frozenset()
    try:
        decoder.start(prompt, 4 * (repeats + 3) + 16, rng)
        decoder.cycle(2)
        for _ in range(repeats + 3):
            for n in rows:
                chain = np.arange(n - 1)
                begin = timed(sync)
                state = decoder.verifier.cache.length, decoder.verifier.last
                decoder.verifier.verify(rng.integers(3, decoder.verifier.vocab, n - 1), chain - 1, chain)
                verify[n].append(timed(sync) - begin)
                decoder.verifier.cache.length, decoder.verifier.last = state
            begin = timed(sync)
            decoder.begin()
            draft[1].append(timed(sync) - begin)
            begin = timed(sync)
            decoder.expand()
            draft[decoder.tree.width].append(timed(sync) - begin)
            decoder.verify(1)
    finally:
        decoder.eos = eos
    return {
        part: {n: statistics.median(seconds[3:]) for n, seconds in curve.items()}
        for part, curve in (("verify", verify), ("draft", draft))
    }


def timed(synchronize: Callable[[], None]) -> float:
    """The time, once the device has nothing left to do."""
    synchronize()
    return time.perf_counter()


def describe(curves: dict[str, dict[int, float]]) -> str:
    """The curves in units of one plain step, in one line."""
    plain = curves["verify"][1]
    verify = ", ".join(f"{n}: {s / plain:.2f}" for n, s in curves["verify"].items())
    widest = max(curves["draft"])
    return (
        f"T_verify(1) {1000 * plain:.1f} ms; T_verify(n)/T_verify(1) {verify}; "
        f"T_expand/T_verify(1) {curves['draft'][widest] / plain:.3f}"
    )
