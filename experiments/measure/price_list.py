"""The price list of a comparison: what forwards cost while this machine decodes texts, by rows.

All arms of a table are trained, tuned, bounded and priced by one list. A forward that is timed alone, among others of as
many rows, is not what it is while a text is decoded: a processor changes its frequency, its caches keep other weights,
and a busy machine is slower for one number of rows than for the next. So texts are decoded, plainly and with settings of
all sizes in turn, and the curves of ``costs`` are multiplied by what their forwards cost there. Plain steps have a factor
of their own, because it is them that speculation is compared with.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.controls import Control, Policy
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.k import KControl
from spec_envs.decoding.clock import CostTable, Forward, WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.experiments.measure.arms import Encoded, Sample, decoded, run_arms
from spec_envs.experiments.measure.costs import Curves, fastest_windows, monotone
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.measure.machine import Machine, machine
from spec_envs.sealed import read_sealed
from spec_envs.settings import Keywords

PROMPTS, TOKENS = 16, 64  # training prompts that are decoded, and tokens of each
OFTEN = 8  # forwards of as many rows whose median counts
SIZES = (3, 7, 11, 15, 23, 31)  # nodes of the trees that are verified then, at random
DEEPEST, LONGEST = 4, 8  # levels of these trees, and tokens of the chains


@dataclass(frozen=True)
class Scales:
    """The factors between what decoded texts cost and the medians of their forwards.

    Attributes:
        plain: of a step of plain decoding.
        verify: of verifications of more than one row.
        draft: of the drafter's forwards.
    """

    plain: float
    verify: float
    draft: float


@dataclass(frozen=True)
class PriceList:
    """A cost table of this machine.

    Attributes:
        curves: the curves in the form of a cost table's file.
        spread: largest difference between the windows of time that the curves come from, as a share of the seconds.
        windows: number of windows that were measured.
        scales: by which the medians of forwards were multiplied, so that whole texts cost what they took.
    """

    curves: Annotated[dict[str, Any], Inline()]
    spread: float
    windows: int
    scales: Scales
    machine: Machine

    @property
    def table(self) -> CostTable:
        return CostTable("measured", **self.curves)


def prices(decoder: Decoder, env: Keywords, control: Control) -> CostTable:
    """Return the cost table of an environment's decoder, measured on its training prompts."""
    return price_list(decoder, control, training_prompts(env), env.get("max_new_tokens")).table


def training_prompts(env: Keywords) -> list[Encoded]:
    """Return the training prompts that are decoded for a price list."""
    return encoded_prompts(env, "train", PROMPTS)


def price_list(
    decoder: Decoder, control: Control, prompts: Sequence[Encoded], max_new_tokens: int | None = None
) -> PriceList:
    """Measure what forwards cost in a decoder whose clock measures.

    Args:
        control: control of the environment.
        prompts: training prompts, the first ``PROMPTS`` of which are decoded.
        max_new_tokens: for which these prompts leave room; never more than ``TOKENS`` are decoded.
    """
    curves, spread, windows = fastest_windows(decoder)
    tokens = min(TOKENS, max_new_tokens or TOKENS)
    samples, forwards = while_decoding(decoder, control, prompts[:PROMPTS], tokens)
    curves = shaped(curves, forwards)
    scales = scales_of(curves, samples)
    return PriceList(file_of(CostTable.of("", scaled(curves, scales))), spread, windows, scales, machine(decoder))


class Timings(WallClock):
    """Measures seconds, and keeps those of every forward, by curve and rows."""

    def __init__(self, device: torch.device):
        self.kept: dict[str, dict[int, list[float]]] = {}
        super().__init__(device)

    def made(self, forward: Forward) -> None:
        before = self.totals[forward.part]
        super().made(forward)
        if forward.part != "prefill" and forward.times and forward.rows:
            seconds = (self.totals[forward.part] - before) / forward.times
            self.kept.setdefault(forward.curve, {}).setdefault(forward.rows, []).append(seconds)

    def medians(self) -> Curves:
        """Return the median of every number of rows that was measured often enough."""
        return {
            curve: {n: statistics.median(found) for n, found in by_rows.items() if len(found) >= OFTEN}
            for curve, by_rows in self.kept.items()
        }


def while_decoding(
    decoder: Decoder, control: Control, prompts: Sequence[Encoded], tokens: int
) -> tuple[dict[str, list[Sample]], Curves]:
    """Return the samples of plain decoding and of random settings, and what forwards cost in the latter. No text ends
    before ``tokens``."""
    clock, eos = decoder.clock, decoder.eos
    timings = Timings(decoder.device)
    decoder.clock, decoder.eos = timings, frozenset()
    try:
        usual = usual_settings(decoder, control)
        policy = Policy(usual, RandomAgent(usual, seed=0))
        arms = {"plain": decoded(decoder.plain(), None), "random": decoded(decoder, policy)}
        return run_arms(arms, prompts, tokens, "what forwards cost"), timings.medians()
    finally:
        decoder.clock, decoder.eos = clock, eos


def usual_settings(decoder: Decoder, control: Control) -> Control:
    """Return a control whose random actions lead to cycles of all usual sizes; where several drafters take turns, the
    control itself."""
    if control.drafters:
        return control
    if decoder.tree.width == 1:
        return KControl(k_max=min(LONGEST, decoder.max_depth + 1), observation="counters")
    return BudgetControl(SIZES, "random", max_depth=min(DEEPEST, decoder.max_depth), width=decoder.tree.width)


def scales_of(curves: Curves, samples: dict[str, list[Sample]]) -> Scales:
    """Return by how much texts cost more than ``curves`` say. What a cycle does besides forwards is charged to
    verifications. Where most of them have one row, as those of prompt lookup may, the rest says too little, and the scale
    is that of plain steps."""
    table = CostTable.of("forwards", curves)
    plain, speculated = (Charged.of(samples[name], table) for name in ("plain", "random"))
    step = plain.verifying / plain.single
    wide = speculated.verifying - step * speculated.single
    return Scales(
        plain=step,
        verify=wide / speculated.several if speculated.several > speculated.single else step,
        draft=speculated.drafting / speculated.drafts if speculated.drafts else 1.0,
    )


@dataclass(frozen=True)
class Charged:
    """Seconds of samples and what a table charges for their forwards.

    Attributes:
        verifying, drafting: seconds that passed; those of decisions are in neither.
        single, several: what the table charges for verifications of one row, and of more.
        drafts: what it charges for drafting.
    """

    verifying: float
    drafting: float
    single: float
    several: float
    drafts: float

    @classmethod
    def of(cls, samples: Sequence[Sample], table: CostTable) -> Charged:
        drafting = sum(sample.parts["draft"] for sample in samples)
        around = sum(sample.seconds - sample.parts["policy"] for sample in samples) - drafting
        priced = {"single": 0.0, "several": 0.0, "drafts": 0.0}
        for sample in samples:
            for (part, rows), times in sample.forwards.items():
                if part == "prefill":
                    continue
                kind = "drafts" if part.startswith("draft") else "single" if rows == 1 else "several"
                priced[kind] += times * table.seconds(part, rows)
        return cls(around, drafting, **priced)


def shaped(alone: Curves, decoding: Curves) -> Curves:
    """Return curves of forwards that were timed alone, multiplied by what forwards of about as many rows cost while texts
    are decoded."""
    found = {}
    for part, curve in alone.items():
        table, known = CostTable.of("timed alone", alone), sorted(decoding.get(part, {}))
        factors = [decoding[part][n] / table.seconds(part, n) for n in known] or [1.0]
        found[part] = {n: s * float(np.interp(n, known or [1], factors)) for n, s in curve.items()}
    return found


def scaled(curves: Curves, scales: Scales) -> Curves:
    """Return scaled curves that never fall."""
    found = {}
    for part, curve in curves.items():
        if part == "verify":
            found[part] = monotone({n: s * (scales.plain if n == 1 else scales.verify) for n, s in curve.items()})
        else:
            found[part] = monotone({n: s * scales.draft for n, s in curve.items()})
    return found


def file_of(table: CostTable) -> dict[str, Any]:
    """Return a cost table as its file has it."""
    curves = {"verify": table.verify, "draft": table.draft}
    return curves | ({"drafters": table.drafters} if table.drafters else {})


def kept(folder: Path, here: Machine) -> CostTable | None:
    """Return the cost table that a run measured when it began; None if there is none, or one of another processor, number
    of threads or dtype."""
    file = folder / "clock.json"
    if not file.exists():
        return None
    made = read_sealed(file, "delete it to measure again").get("machine", {})
    return CostTable.load(str(file)) if same_machine(made, here) else None


def same_machine(made: dict[str, Any], here: Machine) -> bool:
    """Return True if a cost table that was made with ``made`` holds here."""
    return all(made.get(name) == vars(here)[name] for name in ("processor", "threads", "dtype"))
