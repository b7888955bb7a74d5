"""Forwards timed alone: seconds of a forward of the target and of the drafter, by rows; ``price_list`` makes cost tables
of them."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from spec_envs.controls import Control
from spec_envs.decoding.clock import DRAFTER
from spec_envs.decoding.decoder import Decoder, over_models
from spec_envs.decoding.drafters.base import Drafter
from spec_envs.decoding.drafters.copying import CopyingDrafter, CopyingTrees
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.drafters.heads import BlockDrafter, HeadDrafter
from spec_envs.decoding.drafters.portfolio import Portfolio
from spec_envs.decoding.exits.split import SplitVerifier
from spec_envs.decoding.model import kernels
from spec_envs.decoding.model.linear import fast_bfloat16
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.settings import Keywords

LOG = logging.getLogger(__name__)

VERIFY_ROWS = (1, 2, 4, 8, 9, 12, 16, 17, 24, 32, 48, 64, 80, 96)  # 9 and 17, because the cost may jump after 8 and 16
DRAFT_ROWS = (1, 2, 4, 8, 16, 32)  # of a draft model: one token of a chain, and several that it catches up with
CONTEXT = 256  # rows in the cache while curves are measured
LONG = 4096  # rows behind which a plain forward is compared with one behind ``CONTEXT``
SETTLING, SETTLED = 12, 0.2  # forwards, or seconds, after which a processor computes another number of rows steadily
KERNELS = ("q4", "int8")  # dtypes that this project's own kernels compute
REPEATS = 4  # forwards of as many rows that count in a window
WINDOWS, MOST = 3, 6  # windows of time that have to agree, and the most that are measured
LONGEST = 60.0  # seconds after which no further window is measured
AGREE = 0.1  # largest difference between windows that agree, as a share of the seconds

Curves = dict[str, dict[int, float]]
"""Seconds by rows of ``"verify"``, the target's forwards, and ``"draft"``, the drafter's; of several drafters also those
of each, under ``"draft:NAME"``."""


def fastest_windows(
    decoder: Decoder, rows: Sequence[int] = VERIFY_ROWS, repeats: int = REPEATS
) -> tuple[Curves, float, int]:
    """Measure cost curves in several windows of time, until the ``WINDOWS`` fastest ones agree or time is up. Return
    them with the differences of these windows and the number of all.

    The fastest ones count, because other load on the machine makes forwards slower, never faster. Each number of rows
    costs the median of these windows, and never less than fewer rows. Windows that do not agree are logged.
    """
    found: list[Curves] = []
    spread, began = math.inf, time.perf_counter()
    while len(found) < WINDOWS or (spread > AGREE and len(found) < MOST and time.perf_counter() - began < LONGEST):
        found.append(window(decoder, rows, repeats))
        fastest = sorted(found, key=total)[:WINDOWS]
        spread = difference(fastest)
    if spread > AGREE:
        LOG.warning(
            f"the machine is busy: forwards were measured in {len(found)} windows of time, and the fastest {WINDOWS} "
            f"of them differ by {100 * spread:.0f} %; the cost table is as uncertain as that"
        )
    curves = {
        part: monotone({n: statistics.median(one[part][n] for one in fastest) for n in fastest[0][part]})
        for part in fastest[0]
    }
    return curves, spread, len(found)


def total(curves: Curves) -> float:
    """Return the sum of the seconds of all points."""
    return sum(seconds for curve in curves.values() for seconds in curve.values())


def difference(found: Sequence[Curves]) -> float:
    """Return the largest difference between measurements of the same forward, as a share of their median.

    Forwards cheaper than a plain step are compared with a plain step, because a microsecond changes no decision.
    """
    plain = min(min(one["verify"].values()) for one in found)
    shares = []
    for part in found[0]:
        for n in found[0][part]:
            seconds = [one[part][n] for one in found]
            shares.append((max(seconds) - min(seconds)) / max(statistics.median(seconds), plain))
    return max(shares)


def monotone(curve: dict[int, float]) -> dict[int, float]:
    """Return the nearest curve (least squares) that never falls."""
    rows = sorted(curve)
    fitted = isotonic_regression([curve[n] for n in rows]).x
    return dict(zip(rows, map(float, fitted), strict=True))


class Stopwatch:
    """Collects the seconds of forwards, by part and rows.

    Args:
        synchronize: waits until the device has finished its work.
    """

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.seconds: dict[str, dict[int, list[float]]] = {"verify": {}, "draft": {}}
        self.part = "draft"  # to which forwards of the drafter are charged

    @contextmanager
    def time(self, part: str, rows: int) -> Iterator[None]:
        """Time a forward of ``"verify"`` or ``"draft"``."""
        self.synchronize()
        begin = time.perf_counter()
        yield
        self.synchronize()
        part = self.part if part == "draft" else part
        self.seconds.setdefault(part, {}).setdefault(rows, []).append(time.perf_counter() - begin)

    def curves(self, last: int) -> Curves:
        """Return the median of each number of rows over the ``last`` forwards; those before are a warm-up."""
        return {
            part: {rows: statistics.median(seconds[-last:]) for rows, seconds in found.items()}
            for part, found in self.seconds.items()
        }


def window(decoder: Decoder, rows: Sequence[int], repeats: int) -> Curves:
    """Return seconds by rows in one window of time.

    Forwards of as many rows follow each other, and drafting follows a verification, as while a text is decoded. The
    ``repeats`` last of each count: the frequency of a processor and what its caches keep depend on the forwards before,
    for tens of milliseconds, and a plain step behind a wide verification may take longer than in plain decoding.
    """
    rng, watch = np.random.default_rng(0), Stopwatch(decoder.clock.synchronize)
    prompt = rng.integers(3, decoder.verifier.vocab, CONTEXT).tolist()
    eos, decoder.eos = decoder.eos, frozenset()
    try:
        decoder.start(prompt, 4 * (repeats + 1) + 16, rng)
        decoder.cycle(2)
        for n in rows:
            for _ in until_settled(repeats):
                time_verification(decoder, rng.integers(3, decoder.verifier.vocab, n - 1), watch)
        for _ in range(repeats + 1):
            time_drafters(decoder, prompt, watch)
            decoder.verify(decoder.tree.width + 1)  # all of a chain, which must not be cut
    finally:
        decoder.eos = eos
    curves = watch.curves(repeats)
    named = [curve for part, curve in curves.items() if part.startswith(DRAFTER)]
    return curves | {"draft": curves["draft"] or [*named, curves["verify"]][0]}


def until_settled(repeats: int) -> Iterator[int]:
    """Yield once for each forward that has to be made: at most ``SETTLING`` ones and for at most about ``SETTLED``
    seconds, at least one, and then ``repeats``."""
    began = time.perf_counter()
    for i in range(SETTLING):
        yield i
        if time.perf_counter() - began > SETTLED:
            break
    yield from range(repeats)


def time_verification(decoder: Decoder, tokens: np.ndarray, watch: Stopwatch) -> None:
    """Time the verification of a chain of tokens, and take it back."""
    chain, cache = np.arange(len(tokens)), decoder.local.cache
    if isinstance(decoder.verifier, SplitVerifier) and len(tokens):
        decoder.verifier.look(tokens[:-1].tolist())  # drafting has computed all rows but that of the last token
    last, length = decoder.local.last, cache.length
    with watch.time("verify", len(tokens) + 1):
        decoder.verifier.verify(tokens, chain - 1, chain)
    cache.length, decoder.local.last = length, last


def time_drafters(decoder: Decoder, prompt: list[int], watch: Stopwatch) -> None:
    """Time the drafter, or each of several that makes forwards."""
    portfolio = decoder.drafter
    if not isinstance(portfolio, Portfolio):
        time_drafting(decoder, decoder.drafter, prompt, watch)
        return
    for i in sorted(set(range(len(portfolio.names))) - set(portfolio.free)):
        decoder.tree.clear()
        decoder.drafting = False
        portfolio.choose(i)
        watch.part = f"{DRAFTER}{portfolio.drafting}"
        time_drafting(decoder, portfolio.drafters[i], prompt, watch)


def time_drafting(decoder: Decoder, drafter: Drafter | None, prompt: list[int], watch: Stopwatch) -> None:
    """Time a drafter: a draft model over several tokens, other drafters over the first two levels of a cycle."""
    if model := draft_model(drafter):
        for n in DRAFT_ROWS:
            with watch.time("draft", n):
                model.preview(prompt[:n])
        return
    head = drafter.head if isinstance(drafter, CopyingTrees) else drafter
    if isinstance(head, HeadDrafter):
        time_head(decoder, head, prompt, watch)
        return
    if decoder.tree.width > 1 or isinstance(decoder.verifier, SplitVerifier):
        with watch.time("draft", 1):
            decoder.begin()
    else:
        decoder.begin()  # prompt lookup: the search takes no forward, and its tokens cost what expanding by one does
    with watch.time("draft", decoder.tree.width):
        decoder.expand()


def time_head(decoder: Decoder, head: HeadDrafter[Any], prompt: list[int], watch: Stopwatch) -> None:
    """Time a head over the first levels of a cycle, also where copies could stand in front of it, and over several tokens
    that it catches up with, which are taken back."""
    rows = 1 + head.rows if isinstance(head, BlockDrafter) else 1
    timed = {rows}
    with watch.time("draft", rows):
        head.root(decoder.tree)
    if not isinstance(head, BlockDrafter):
        timed.add(head.width)
        with watch.time("draft", head.width):
            head.expand(decoder.tree)
    target, length = head.model.target, head.cache.length
    for n in sorted(set(DRAFT_ROWS) - timed):
        states = torch.zeros(n, len(head.capture) * target.shape.hidden, dtype=target.precision.hidden)
        with watch.time("draft", n):
            head.read(states.to(target.device), prompt[:n])
        head.cache.length = length


def draft_model(drafter: Drafter | None) -> DraftModelDrafter | None:
    """Return the draft model of a drafter, also where prompt lookup comes first; None if it has none."""
    model = drafter.model if isinstance(drafter, CopyingDrafter) else drafter
    return model if isinstance(model, DraftModelDrafter) else None


def context_ratio(decoder: Decoder, repeats: int = 10) -> float | None:
    """Return the seconds of a plain forward behind ``LONG`` tokens over those of one behind ``CONTEXT``; None if a text
    of the target cannot be as long. The two take turns."""
    plain, rng = decoder.plain(), np.random.default_rng(0)
    if plain.verifier.context < LONG + 16:
        return None
    plain.start(rng.integers(3, plain.verifier.vocab, LONG).tolist(), 16, rng)
    watches = {length: Stopwatch(plain.clock.synchronize) for length in (CONTEXT, LONG)}
    for _ in range(repeats + 1):
        for length, watch in watches.items():
            plain.local.cache.length = length
            time_verification(plain, np.zeros(0, np.int64), watch)
    seconds = {length: watch.curves(repeats)["verify"][1] for length, watch in watches.items()}
    return seconds[LONG] / seconds[CONTEXT]


def dtypes_at_speed(device: torch.device) -> list[str]:
    """Return the dtypes that a device computes fast, and float32."""
    own = list(KERNELS) if device.type == "cpu" and kernels.fast() else []
    return [*own, *(["bfloat16"] if fast_bfloat16(device) else []), "float32"]


def decoders_by_dtype(env: Keywords, control: Control, dtypes: Sequence[str]) -> dict[str, Decoder]:
    """Return a greedy decoder in each of ``dtypes`` that the models can be computed in."""
    decoders = {}
    for dtype in dtypes:
        try:
            decoders[dtype] = over_models(decoder_for({**env, "dtype": dtype, "temperature": 0.0}, control))
        except ValueError as error:  # the kernels do not compute all widths and files
            LOG.warning(f"{dtype} is left out: {error}")
    return decoders


def describe(curves: Curves) -> str:
    """Return one line with the curves in units of a plain step."""
    plain = curves["verify"][1]
    verify = ", ".join(f"{n}: {s / plain:.2f}" for n, s in curves["verify"].items())
    draft = ", ".join(f"{n}: {s / plain:.3f}" for n, s in curves["draft"].items())
    return f"T_verify(1) {1000 * plain:.1f} ms; T_verify(n)/T_verify(1) {verify}; T_draft(n)/T_verify(1) {draft}"
