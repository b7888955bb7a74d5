"""Results: ratios with their intervals, tables as JSON and back, and sentences about them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import pytest

from spec_envs.experiments.evaluate import folder_name
from spec_envs.experiments.measure.arms import Encoded, Sample
from spec_envs.experiments.measure.encoding import Inline, from_json, to_json
from spec_envs.experiments.measure.figures import error_bars
from spec_envs.experiments.measure.report import most_played
from spec_envs.experiments.measure.results import Compared, Comparison, Interval
from spec_envs.experiments.measure.statistics import ratio, throughput, with_aa_check


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


def test_dataclasses_as_json_and_back() -> None:
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
def test_what_does_not_fit_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_json(Arm, WRITTEN | change)


def test_intervals_in_words() -> None:
    interval = Interval(1.2345, 1.0, 2.0)
    assert f"{interval:.2f}" == "1.23 [1.00, 2.00]" and 1 in interval and 2.5 not in interval


def test_ratios_are_of_sums_and_paired() -> None:
    def sample(tokens: int, seconds: float) -> Sample:
        return Sample(Encoded("t", []), tokens, seconds, 0.0, [])

    slow = [sample(10, 1.0), sample(100, 20.0), sample(50, 4.0)]
    fast = [sample(s.tokens, s.seconds / 2) for s in slow]
    assert throughput(slow) == 160 / 25
    assert ratio(fast, slow) == Interval(*[pytest.approx(2.0)] * 3)
    noisy = [sample(s.tokens, s.seconds * f) for s, f in zip(slow, (0.4, 0.6, 0.5), strict=True)]
    found = ratio(noisy, slow)
    assert found.low < found.value < found.high


def test_a_run_that_disagrees_with_itself_is_repeated() -> None:
    asked = []

    def measure(prompts: int) -> Comparison:
        asked.append(prompts)
        over = {"plain": Interval(1.15, 1.1 if prompts < 8 else 0.9, 1.2)}
        return Comparison(arms={"plain again": Compared(tokens_per_second=1.0, over=over)})

    assert with_aa_check(measure, 8).first_try is None
    repeated = with_aa_check(measure, 5)
    assert asked == [8, 5, 10] and not repeated.first_try.agrees and repeated.agrees


def test_evaluations_have_folders_of_their_own() -> None:
    assert folder_name({"temperature": 1.0, "count": 3}) == "temperature_1.0-count_3"
    long = [folder_name({"depth": ["runs/" + "x" * 200, end]}) for end in "12"]
    assert max(map(len, long)) < 160 and long[0] != long[1]


def test_a_collapsed_policy_is_found() -> None:
    played = {"math": {"3": 0, "7": 96}, "code": {"3": 4, "7": 100}}
    assert most_played(played) == ("7", 0.98)


def test_bars_of_a_value_that_rounding_puts_outside_its_interval() -> None:
    assert error_bars([Interval(1.0, 1.0 + 1e-16 * 4, 1.0)]) == [[0.0], [0.0]]
    assert error_bars([Interval(1.0, 0.5, 1.25)]) == [[0.5], [0.25]]
