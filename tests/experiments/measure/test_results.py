"""Result tables: intervals of ratios, dataclasses as JSON and back, folder names and notes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import pytest

from spec_envs.experiments.evaluate import folder_name
from spec_envs.experiments.measure.arms import Encoded, Sample
from spec_envs.experiments.measure.encoding import Inline, from_json, to_json
from spec_envs.experiments.measure.results import Compared, Comparison, Interval
from spec_envs.experiments.measure.statistics import ratio, throughput, with_aa_check
from spec_envs.experiments.reports.figures import error_bars
from spec_envs.experiments.reports.report import most_used


@dataclass
class Arm:
    over: Annotated[dict[str, Interval], Inline("over_")]
    seconds: Annotated[dict[str, float], Inline(suffix="_s")]
    latency_s: float
    curve: dict[int, float]
    sizes: tuple[int, int]
    setting: list[int | str]
    note: str | None = None
    again: Arm | None = None


ARM = Arm({"plain": Interval(2.0, 1.5, 2.5)}, {"edge": 1.0}, 3.0, {1: 0.5}, (1, 2), [4, "2x7"], again=None)
WRITTEN = {
    "over_plain": {"value": 2.0, "low": 1.5, "high": 2.5},
    "edge_s": 1.0,
    "latency_s": 3.0,
    "curve": {"1": 0.5},
    "sizes": [1, 2],
    "setting": [4, "2x7"],
}


def test_dataclasses_survive_json() -> None:
    written = json.loads(json.dumps(to_json(ARM)))
    assert written == WRITTEN and from_json(Arm, written) == ARM
    both = Arm(**{**vars(ARM), "note": "x", "again": ARM})
    assert from_json(Arm, json.loads(json.dumps(to_json(both)))) == both


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"latency_s": "3"}, "'3' stands where float is expected"),
        ({"latency_s": None}, "'None' stands where float is expected"),
        ({"over_plain": {"value": 1.0}}, "low is missing"),
        ({"curve": [1.0]}, "stands where dict is expected"),
        ({"again": 7}, "stands where Arm is expected"),
        ({"setting": [1.5]}, "stands where int is expected"),
    ],
)
def test_json_of_wrong_type_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_json(Arm, WRITTEN | change)


def test_interval_format_and_membership() -> None:
    interval = Interval(1.2345, 1.0, 2.0)
    assert f"{interval:.2f}" == "1.23 [1.00, 2.00]" and 1 in interval and 2.5 not in interval


def test_ratio_is_of_sums_with_paired_interval() -> None:
    def sample(tokens: int, seconds: float) -> Sample:
        return Sample(Encoded("t", []), tokens, seconds, 0.0, [])

    slow = [sample(10, 1.0), sample(100, 20.0), sample(50, 4.0)]
    fast = [sample(s.tokens, s.seconds / 2) for s in slow]
    assert throughput(slow) == 160 / 25
    assert ratio(fast, slow) == Interval(*[pytest.approx(2.0)] * 3)
    noisy = [sample(s.tokens, s.seconds * f) for s, f in zip(slow, (0.4, 0.6, 0.5), strict=True)]
    found = ratio(noisy, slow)
    assert found.low < found.value < found.high


def test_failed_aa_check_repeats_with_more_prompts() -> None:
    asked = []

    def measure(prompts: int) -> Comparison:
        asked.append(prompts)
        over = {"plain": Interval(1.15, 1.1 if prompts < 8 else 0.9, 1.2)}
        return Comparison(arms={"plain again": Compared(tokens_per_second=1.0, over=over)})

    assert with_aa_check(measure, 8).first_try is None
    repeated = with_aa_check(measure, 5)
    assert asked == [8, 5, 10] and not repeated.first_try.agrees and repeated.agrees


def test_evaluation_folders_have_distinct_names() -> None:
    assert folder_name({"temperature": 1.0, "count": 3}) == "temperature_1.0-count_3"
    long = [folder_name({"depth": ["runs/" + "x" * 200, end]}) for end in "12"]
    assert max(map(len, long)) < 160 and long[0] != long[1]


def test_most_used_finds_collapsed_policy() -> None:
    histogram = {"math": {"3": 0, "7": 96}, "code": {"3": 4, "7": 100}}
    assert most_used(histogram) == ("7", 0.98)


def test_error_bars_are_never_negative() -> None:
    assert error_bars([Interval(1.0, 1.0 + 1e-16 * 4, 1.0)]) == [[0.0], [0.0]]
    assert error_bars([Interval(1.0, 0.5, 1.25)]) == [[0.5], [0.25]]
