"""Constructed results, such as the benchmarks measure."""

from __future__ import annotations

from collections.abc import Sequence

from spec_envs.experiments.measure.machine import Machine
from spec_envs.experiments.measure.results import Best, Divergence, Interval, Results, Row

VERSIONS = {"torch": "2.8.0", "numpy": "2.0.0"}
MACHINE = Machine("A Processor", 2, "int8", VERSIONS, "0123abc", "wall")
CURVES = {"verify": {1: 0.01, 8: 0.012, 16: 0.02}, "draft": {1: 0.001, 8: 0.0011, 10: 0.0012}}
TASKS = ("gsm8k", "humaneval")


def interval(value: float) -> Interval:
    """Return a ratio with an interval of five per cent on either side."""
    return Interval(value, 0.95 * value, 1.05 * value)


def row(speed: float, references: Sequence[str]) -> Row:
    """Return a row whose throughput is ``speed`` times that of every reference."""
    return Row(
        tokens_per_second=100 * speed,
        over={name: interval(speed) for name in references},
        emitted_per_cycle=2.0,
        accepted_per_verified=0.5,
        verified_per_cycle=3.0,
        prefill_seconds=0.1,
        seconds=1 / speed,
        parts={"draft": 0.2, "verify": 0.6, "network": 0.0, "policy": 0.01},
        prompts=4,
    )


def results(arms: Sequence[str], references: Sequence[str], learned: Sequence[str] = ()) -> Results:
    """Return a table of plain decoding (twice) and the arms, each faster than the one before it."""
    speeds = {"plain": 1.0, "plain again": 1.0} | {name: 1.2 + 0.1 * i for i, name in enumerate(arms)}
    return Results(
        arms={name: row(speed, references) for name, speed in speeds.items()},
        references=list(references),
        prompts=4,
        tasks=list(TASKS),
        max_new_tokens=32,
        temperature=0.0,
        machine=MACHINE,
        seconds=CURVES,
        curves="T_verify(1) 10.0 ms",
        actions={name: {task: {"1": 3, "2": 1} for task in TASKS} for name in learned},
        decisions=dict.fromkeys(learned, "k"),
        by_task={name: dict.fromkeys(TASKS, 100 * speed) for name, speed in speeds.items()},
        divergences={name: Divergence(0.0, 0.0, 1.0) for name in ("plain", *learned)},
        static=Best(best=[4], tokens_per_second={"k 2": 1.0, "k 4": 2.0}),
    )
