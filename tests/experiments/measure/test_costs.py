"""Cost tables measured on a machine that is quiet, busy for a while, or always busy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spec_envs.controls.depth import DepthControl
from spec_envs.decoding.decoder import Decoder
from spec_envs.experiments.measure import costs
from spec_envs.experiments.measure.live import decoder_for

TRUE = {"verify": {1: 0.060, 2: 0.061, 4: 0.063, 8: 0.064, 12: 0.066, 16: 0.068}, "draft": {1: 0.004}}


def busy(monkeypatch: pytest.MonkeyPatch, *loads: dict[int, float]) -> list[int]:
    """Multiply forward seconds by each window's factors, by rows; later windows are quiet.

    Return a counter of windows.
    """
    count = [0]

    def window(decoder: Any, rows: Any, repeats: int) -> costs.Curves:
        load = loads[count[0]] if count[0] < len(loads) else {}
        count[0] += 1
        return {part: {n: s * load.get(n, 1.0) for n, s in curve.items()} for part, curve in TRUE.items()}

    monkeypatch.setattr(costs, "window", window)
    return count


def test_quiet_machine_needs_three_windows(
    tiny_decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    count = busy(monkeypatch)
    assert costs.fastest_windows(tiny_decoder) == (TRUE, 0.0, 3)
    assert count == [3] and not caplog.messages


def test_disagreeing_windows_are_measured_again(
    tiny_decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """These windows were once accepted as a table: 60, 58, 125, 82, 214, 100 ms."""
    load = {2: 0.95, 4: 2.0, 8: 1.3, 12: 3.2, 16: 1.5}
    count = busy(monkeypatch, load, load, {1: 1.4})
    assert costs.fastest_windows(tiny_decoder) == (TRUE, 0.0, 6)
    assert count == [6] and not caplog.messages


def test_always_busy_machine_is_reported(
    tiny_decoder: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loads = [{4: 1.0 + i % 4, 12: 1.0 + (i + 2) % 4} for i in range(20)]
    count = busy(monkeypatch, *loads)
    curves, spread, windows = costs.fastest_windows(tiny_decoder)
    assert count == [windows] == [costs.MOST] and spread > costs.AGREE
    assert "the machine is busy" in caplog.text
    seconds = list(curves["verify"].values())
    assert seconds == sorted(seconds)


def test_curves_are_made_monotone() -> None:
    assert costs.monotone({1: 3.0, 2: 1.0, 4: 5.0}) == {1: 2.0, 2: 2.0, 4: 5.0}


def test_a_head_costs_the_same_rows_where_copies_stand_in_front_of_it(tiny: dict[str, Any]) -> None:
    """The 16 tokens of this target repeat themselves, so that nearly every cycle is one of copies."""
    head = tiny["drafter"]
    alone, behind = (
        costs.window(decoder_for({**tiny, "drafter": name}, DepthControl()), [1, 4], 2)
        for name in (str(head), f"lookup+{head}")
    )
    assert {part: set(curve) for part, curve in behind.items()} == {part: set(curve) for part, curve in alone.items()}
    assert all(seconds > 0 for curve in behind.values() for seconds in curve.values())


def test_forwards_count_once_the_processor_has_settled(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is slower for some forwards after the number of rows has changed."""
    made: list[int] = []

    def time_verification(decoder: Decoder, tokens: np.ndarray, watch: costs.Stopwatch) -> None:
        made.append(rows := len(tokens) + 1)
        settled = len(made) > 6 and set(made[-7:]) == {rows}
        watch.seconds["verify"].setdefault(rows, []).append(rows / 100 if settled else 1.0)

    monkeypatch.setattr(costs, "time_verification", time_verification)
    decoder = decoder_for({**tiny, "drafter": str(tiny["drafter"])}, DepthControl())
    assert costs.window(decoder, [8, 1, 4], 3)["verify"] == {8: 0.08, 1: 0.01, 4: 0.04}


def test_slow_forwards_settle_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "SETTLED", -1.0)
    assert len(list(costs.until_settled(4))) == 1 + 4
    monkeypatch.setattr(costs, "SETTLED", 60.0)
    assert len(list(costs.until_settled(4))) == costs.SETTLING + 4
