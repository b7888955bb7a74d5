from __future__ import annotations

import time
from pathlib import Path

import pytest

from spec_envs.decoding.clock import CostTable, PricedClock, WallClock
from tests.support.models.tiny import CPU


def test_published_calibration() -> None:
    """Cycle times at draft depth 8 (nine drafter forwards) are as published."""
    table = CostTable.load("qwen3-14b-a6000")
    assert table.seconds("verify", 1) == 0.0496
    for nodes, cycle in ((10, 0.0719), (30, 0.0741), (60, 0.0773), (100, 0.0838), (160, 0.108), (220, 0.124)):
        assert table.seconds("verify", nodes + 1) + 9 * table.seconds("draft", 10) == pytest.approx(cycle, abs=1e-4)


def test_tables_interpolate_and_extrapolate(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"verify": {"1": 1.0, "5": 3.0, "9": 4.0}, "draft": {"10": 0.5}}')
    table = CostTable.load(str(path))
    assert [table.seconds("verify", n) for n in (1, 3, 5, 7, 9, 13)] == [1.0, 2.0, 3.0, 3.5, 4.0, 5.0]
    assert table.seconds("draft", 1) == table.seconds("draft", 40) == 0.5


def test_clocks_charge_seconds_by_part() -> None:
    wall, priced = WallClock(CPU), PricedClock(CostTable("t", {1: 2.0}, {1: 0.5}))
    for clock in (wall, priced):
        before = dict(clock.totals)
        with clock.time("verify", 1):
            time.sleep(0.01)
        clock.charge("policy", 0.25)
        spent = clock.since(before)
        assert spent["policy"] == 0.25 and spent["draft"] == 0.0
        assert spent["verify"] == 2.0 if clock.priced else 0.01 <= spent["verify"] < 1.0


def test_falling_curve_is_not_extrapolated_below_its_end() -> None:
    table = CostTable("made up", {1: 1.0}, {1: 2.0, 10: 1.0})
    assert table.seconds("draft", 500) == 1.0 and table.seconds("draft", 0) == 0.0
