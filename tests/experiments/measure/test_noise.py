"""The A/A check of a table whose clock is noisy: an interval that is only wide makes the timings void."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spec_envs import generation
from spec_envs.controls import make_control
from spec_envs.decoding import clock
from spec_envs.decoding.clock import CostTable, Forward, WallClock
from spec_envs.experiments.measure import arms
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.experiments.measure.results import Results, Verdict
from spec_envs.experiments.measure.static import static_policy
from spec_envs.experiments.measure.statistics import with_aa_check
from spec_envs.experiments.measure.tables import run_tables
from spec_envs.experiments.reports.report import markdown
from spec_envs.experiments.reports.screen import screen

TEXTS = 12


class SimulatedTime:
    """The time of a machine on which forwards take the seconds of a cost table, times a factor that is drawn for every
    text and whose logarithm has the standard deviation ``noise``."""

    def __init__(self, table: CostTable, noise: float):
        self.table, self.noise, self.rng = table, noise, np.random.default_rng(0)
        self.now, self.factor = 0.0, 1.0

    def perf_counter(self) -> float:
        return self.now

    def rule(self, patch: pytest.MonkeyPatch) -> None:
        """Replace the clock of this machine, for everything that times a text."""
        restart, made = WallClock.restart, WallClock.made

        def begin(own: WallClock) -> None:
            self.factor = float(self.rng.lognormal(0, self.noise))
            restart(own)

        def ended(own: WallClock, forward: Forward) -> None:
            self.now += self.factor * forward.times * self.table.seconds(forward.curve, forward.rows)
            made(own, forward)

        patch.setattr(WallClock, "restart", begin)
        patch.setattr(WallClock, "made", ended)
        for module in (clock, generation, arms):
            patch.setattr(module, "time", self)


def measured(noise: float, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Results:
    """Return the table of plain decoding and a static setting, each measured twice."""
    table = CostTable.load(tiny["clock"])
    SimulatedTime(table, noise).rule(monkeypatch)
    env = {**tiny, "clock": "wall", "max_new_tokens": 16}
    control = make_control("depth", env)
    policies, decoder = {"static": static_policy(control, (2, 7))}, decoder_for(env, control)

    def run(count: int) -> Results:
        return run_tables(policies, env, decoder, count, ["plain", "static"], [], {}, table)

    return with_aa_check(run, TEXTS)


def test_wide_interval_that_contains_one_is_void(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = measured(0.4, tiny, monkeypatch)
    assert set(found.again) == {"plain", "static"} and found.prompts == TEXTS and found.first_try is None
    for ratio in found.again.values():
        assert 1 in ratio and (ratio.low < 0.95 or ratio.high > 1.05)
    assert found.agrees and not found.quiet
    reason = "wider than ±5 %. TIMED ON A BUSY MACHINE OR ON TOO FEW PROMPTS, so these timings are void."
    assert found.aa_check().endswith(reason) and reason in markdown(found)
    assert "VOID: an arm that was timed twice differs from itself" in markdown(found)
    assert "Read the priced table, or time again" in " ".join(screen(found, tmp_path, "again", None).split())
    assert found.at_prices and found.at_prices.arms["plain again"].over["plain"].value == 1.0
    verdicts = found.verdicts()
    static = found.arms["static"].over["plain"].value
    assert verdicts["live"]["static"] == Verdict(1.0, 1.0, 1.0, static, True, found.aa_check())
    assert not any(verdict.void or verdict.reason for verdict in verdicts["priced"].values())


def test_narrow_interval_is_trusted(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(0.01, tiny, monkeypatch)
    assert all(ratio.low < 1 < ratio.high for ratio in found.again.values()) and found.quiet
    assert found.aa_check().endswith("contains 1, within ±5 %.") and "VOID" not in markdown(found)
    assert not found.verdicts()["live"]["static"].void
