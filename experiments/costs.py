"""Cost curves of this machine, seconds of a target forward and of a drafter forward by rows, and how near a forward is
to the time that reading its weights takes."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from experiments.live import decoder_for
from spec_envs.controls import Control
from spec_envs.decoding import int8, kernels
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.copying import CopyingDrafter
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.linear import fast_bfloat16
from spec_envs.decoding.split import SplitVerifier

VERIFY_ROWS = (1, 2, 4, 8, 12, 16, 17, 24, 32, 48, 64, 80, 96)  # a row more than a tile of 16 costs a jump
DRAFT_ROWS = (1, 2, 4, 8, 16, 32)  # of a draft model: one token of a chain, or more that it has to catch up with
CONTEXT = 256  # rows in the cache when a curve is measured


def cost_curves(decoder: Decoder, rows: Sequence[int] = VERIFY_ROWS, repeats: int = 11) -> dict[str, dict[int, float]]:
    """Seconds by rows of ``verify`` and of ``draft``, behind a text of ``CONTEXT`` tokens.

    The row counts are visited in turn, ``repeats`` times over, so that a machine that drifts bends all of them alike.
    """
    rng = np.random.default_rng(0)
    prompt = rng.integers(3, decoder.verifier.vocab, CONTEXT).tolist()
    sync = decoder.clock.synchronize
    verify: dict[int, list[float]] = {n: [] for n in rows}
    model = draft_model(decoder)
    draft: dict[int, list[float]] = {n: [] for n in (DRAFT_ROWS if model else (1, decoder.tree.width))}
    eos, decoder.eos = decoder.eos, frozenset()
    try:
        decoder.start(prompt, 4 * (repeats + 3) + 16, rng)
        decoder.cycle(2)
        for _ in range(repeats + 3):
            for n in rows:
                chain, tokens = np.arange(n - 1), rng.integers(3, decoder.verifier.vocab, n - 1)
                if isinstance(decoder.verifier, SplitVerifier) and n > 1:
                    decoder.verifier.look(tokens[:-1].tolist())  # the last one's row alone is left to the verification
                begin = timed(sync)
                state = decoder.local.cache.length, decoder.local.last
                decoder.verifier.verify(tokens, chain - 1, chain)
                verify[n].append(timed(sync) - begin)
                decoder.local.cache.length, decoder.local.last = state
            if model is not None:
                for n in DRAFT_ROWS:
                    begin = timed(sync)
                    model.preview(prompt[:n])
                    draft[n].append(timed(sync) - begin)
            else:
                begin = timed(sync)
                decoder.begin()
                if decoder.tree.width > 1 or isinstance(
                    decoder.verifier, SplitVerifier
                ):  # of lookup, those behind are enough
                    draft[1].append(timed(sync) - begin)
                begin = timed(sync)
                decoder.expand()
                draft[decoder.tree.width].append(timed(sync) - begin)
            decoder.verify(decoder.tree.width + 1)  # the whole of a chain, which may not be cut
    finally:
        decoder.eos = eos
    return {
        part: {n: statistics.median(seconds[3:]) for n, seconds in curve.items()}
        for part, curve in (("verify", verify), ("draft", draft))
    }


def draft_model(decoder: Decoder) -> DraftModelDrafter | None:
    """The draft model of a decoder that has one, be it behind prompt lookup."""
    drafter = decoder.drafter.model if isinstance(decoder.drafter, CopyingDrafter) else decoder.drafter
    return drafter if isinstance(drafter, DraftModelDrafter) else None


def dtypes_at_speed(device: torch.device) -> list[str]:
    """The dtypes that compute at speed here, and float32."""
    dtypes = ["int8"] if device.type == "cpu" and kernels.fast() else []
    return [*dtypes, *(["bfloat16"] if fast_bfloat16(device) else []), "float32"]


def curves_by_dtype(
    env: dict[str, Any], control: Control, dtypes: Sequence[str]
) -> dict[str, dict[str, dict[int, float]]]:
    """Cost curves in each of ``dtypes`` that the model can be computed in."""
    curves = {}
    for dtype in dtypes:
        try:
            decoder = decoder_for({**env, "dtype": dtype}, control)
        except ValueError as error:  # widths that the int8 kernels do not compute
            print(f"no cost curve in {dtype}: {error}", file=sys.stderr)
            continue
        curves[dtype] = cost_curves(decoder, repeats=5)
    return curves


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of weights that one forward of the target reads: every layer and the head."""
    shape, target = decoder.local.target.shape, decoder.local.target
    heads = shape.heads + 2 * shape.kv_heads
    attention = shape.hidden * shape.head_dim * (heads + shape.heads)
    feed = 3 * shape.hidden * target.config.intermediate_size
    count = shape.layers * (attention + feed) + shape.vocab * shape.hidden
    return count * target.dtype.itemsize


def read_seconds(size: int, repeats: int = 15) -> float:
    """Seconds of reading ``size`` bytes of memory once, on all threads: the floor of a forward of that many bytes."""
    data = torch.zeros(size // 4)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        int8.read_all(data)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def timed(synchronize: Callable[[], None]) -> float:
    """The time, once the device has nothing left to do."""
    synchronize()
    return time.perf_counter()


def describe(curves: dict[str, dict[int, float]]) -> str:
    """The curves in units of one plain step, in one line."""
    plain = curves["verify"][1]
    verify = ", ".join(f"{n}: {s / plain:.2f}" for n, s in curves["verify"].items())
    draft = ", ".join(f"{n}: {s / plain:.3f}" for n, s in curves["draft"].items())
    return f"T_verify(1) {1000 * plain:.1f} ms; T_verify(n)/T_verify(1) {verify}; T_draft(n)/T_verify(1) {draft}"
