"""Cost curves of this machine, seconds of a target forward and of a drafter forward by rows, and how near a forward is
to the time that reading its weights takes."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from spec_envs.controls import Control
from spec_envs.decoding.decoder import Decoder, over_models
from spec_envs.decoding.drafters.copying import CopyingDrafter
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.exits.split import SplitVerifier
from spec_envs.decoding.model import int8, kernels
from spec_envs.decoding.model.linear import fast_bfloat16
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.experiments.measure.machine import Machine, machine
from spec_envs.settings import Keywords

LOG = logging.getLogger(__name__)

VERIFY_ROWS = (1, 2, 4, 8, 12, 16, 17, 24, 32, 48, 64, 80, 96)  # a row more than a tile of 16 costs a jump
DRAFT_ROWS = (1, 2, 4, 8, 16, 32)  # of a draft model: one token of a chain, or more that it has to catch up with
CONTEXT = 256  # rows in the cache when a curve is measured
WINDOWS, MOST = 3, 9  # windows of time that have to agree, and that are tried until they do
LONGEST = 60.0  # seconds after which no further window is tried
AGREE = 0.1  # largest difference between windows, as a share of the seconds

Curves = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Measured:
    """A cost table of this machine.

    Attributes:
        curves: seconds by rows of ``verify`` and ``draft``.
        spread: the largest difference between the windows of time that they are from, as a share of the seconds.
        windows: how many were tried.
    """

    curves: Annotated[Curves, Inline()]
    spread: float
    windows: int
    machine: Machine


def cost_curves(decoder: Decoder, rows: Sequence[int] = VERIFY_ROWS, repeats: int = 4) -> Curves:
    """Return seconds by rows of ``verify`` and of ``draft``, after a text of ``CONTEXT`` tokens; see ``measured``."""
    return measured(decoder, rows, repeats).curves


def measured(decoder: Decoder, rows: Sequence[int] = VERIFY_ROWS, repeats: int = 4) -> Measured:
    """Measure cost curves in several windows of time, until the ``WINDOWS`` fastest ones agree or time is up: whatever
    else runs on a machine makes forwards slower, never faster. Windows that do not agree are logged.

    Of each number of rows the median counts; more rows never cost less.
    """
    found: list[Curves] = []
    spread, began = math.inf, time.perf_counter()
    while len(found) < WINDOWS or (spread > AGREE and len(found) < MOST and time.perf_counter() - began < LONGEST):
        found.append(window(decoder, rows, repeats))
        fastest = sorted(found, key=total)[:WINDOWS]
        spread = difference(fastest)
    if spread > AGREE:
        LOG.warning(
            f"the machine is busy: of {len(found)} windows of time in which forwards were measured, the fastest "
            f"{WINDOWS} differ by {100 * spread:.0f} %; the cost table is uncertain by as much"
        )
    curves = {
        part: monotone({n: statistics.median(one[part][n] for one in fastest) for n in fastest[0][part]})
        for part in fastest[0]
    }
    return Measured(curves, spread, len(found), machine(decoder))


def total(curves: Curves) -> float:
    """Return the seconds of all forwards together."""
    return sum(seconds for curve in curves.values() for seconds in curve.values())


def difference(found: Sequence[Curves]) -> float:
    """Return the largest difference between several measurements of the same forward, as a share of their median; that
    of the cheapest ones counts against a plain step, for a microsecond more or less bends no decision."""
    plain = min(min(one["verify"].values()) for one in found)
    shares = []
    for part in found[0]:
        for n in found[0][part]:
            seconds = [one[part][n] for one in found]
            shares.append((max(seconds) - min(seconds)) / max(statistics.median(seconds), plain))
    return max(shares)


def monotone(curve: dict[int, float]) -> dict[int, float]:
    """Return the nearest curve that never falls."""
    rows = sorted(curve)
    fitted = isotonic_regression([curve[n] for n in rows]).x
    return dict(zip(rows, map(float, fitted), strict=True))


def window(decoder: Decoder, rows: Sequence[int], repeats: int) -> Curves:
    """Return seconds by rows in one window of time.

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
        decoder.start(prompt, 4 * (repeats + 1) + 16, rng)
        decoder.cycle(2)
        for _ in range(repeats + 1):  # the first one warms up
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
                ):  # of lookup, the expansions are enough
                    draft[1].append(timed(sync) - begin)
                begin = timed(sync)
                decoder.expand()
                draft[decoder.tree.width].append(timed(sync) - begin)
            decoder.verify(decoder.tree.width + 1)  # the whole of a chain, which may not be cut
    finally:
        decoder.eos = eos
    return {
        part: {n: statistics.median(seconds[1:]) for n, seconds in curve.items()}
        for part, curve in (("verify", verify), ("draft", draft))
    }


def draft_model(decoder: Decoder) -> DraftModelDrafter | None:
    """Return the draft model of a decoder that has one, be it after prompt lookup."""
    drafter = decoder.drafter.model if isinstance(decoder.drafter, CopyingDrafter) else decoder.drafter
    return drafter if isinstance(drafter, DraftModelDrafter) else None


def dtypes_at_speed(device: torch.device) -> list[str]:
    """Return the dtypes that compute at speed here, and float32."""
    dtypes = ["int8"] if device.type == "cpu" and kernels.fast() else []
    return [*dtypes, *(["bfloat16"] if fast_bfloat16(device) else []), "float32"]


def curves_by_dtype(env: Keywords, control: Control, dtypes: Sequence[str]) -> dict[str, Curves]:
    """Return cost curves in each of ``dtypes`` that the model can be computed in."""
    curves = {}
    for dtype in dtypes:
        try:
            decoder = over_models(decoder_for({**env, "dtype": dtype}, control))
        except ValueError as error:  # widths that the int8 kernels do not compute
            LOG.warning(f"no cost curve in {dtype}: {error}")
            continue
        curves[dtype] = cost_curves(decoder, repeats=3)
    return curves


def weight_bytes(decoder: Decoder) -> int:
    """Return the bytes of weights that one forward of the target reads: every layer and the head."""
    shape, target = decoder.local.target.shape, decoder.local.target
    heads = shape.heads + 2 * shape.kv_heads
    attention = shape.hidden * shape.head_dim * (heads + shape.heads)
    feed = 3 * shape.hidden * target.config.intermediate_size
    count = shape.layers * (attention + feed) + shape.vocab * shape.hidden
    return int(count * target.dtype.itemsize)


def read_seconds(size: int, repeats: int = 15) -> float:
    """Return the seconds of reading ``size`` bytes of memory once, on all threads: the floor of a forward of that many
    bytes."""
    data = torch.zeros(size // 4)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        int8.read_all(data)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def timed(synchronize: Callable[[], None]) -> float:
    """Return the time once the device has nothing left to do."""
    synchronize()
    return time.perf_counter()


def describe(curves: Curves) -> str:
    """Return the curves in units of one plain step, in one line."""
    plain = curves["verify"][1]
    verify = ", ".join(f"{n}: {s / plain:.2f}" for n, s in curves["verify"].items())
    draft = ", ".join(f"{n}: {s / plain:.3f}" for n, s in curves["draft"].items())
    return f"T_verify(1) {1000 * plain:.1f} ms; T_verify(n)/T_verify(1) {verify}; T_draft(n)/T_verify(1) {draft}"
