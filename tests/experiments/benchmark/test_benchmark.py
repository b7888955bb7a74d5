"""The benchmark's statistics, and the sentences and rows of its report."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from spec_envs.experiments.benchmark.findings import FewTexts, Findings, Learned
from spec_envs.experiments.benchmark.report import cheaper, ranking
from spec_envs.experiments.measure.results import Divergence, Interval
from spec_envs.experiments.measure.statistics import over_texts_and_seeds
from spec_envs.experiments.reports.report import text_notes


def test_text_notes_group_arms_with_equal_figures() -> None:
    clean = Divergence(per_1000=0.0, largest_gap=0.0, same_text=1.0)
    lines = text_notes({"plain": clean, "a": clean, "b": replace(clean, per_1000=2.0), "c": clean})
    assert [line.partition(":")[0] for line in lines] == ["plain", "a, c", "b"]
    assert "0.0 of 1,000" in lines[1] and "2.0 of 1,000" in lines[2] and "100 % of prompts" in lines[2]
    assert "prompts" not in lines[0]


@pytest.mark.parametrize(
    ("least", "sentence"), [(1.05, "after 3 texts, with 1/50"), (1.2, "None of these reaches `ppo`")]
)
def test_cheaper_names_fewest_texts_as_good_as_ppo(least: float, sentence: str) -> None:
    ppo = learned(Interval(least, least, least), Interval(1.0, 1.0, 1.0))
    assert sentence in cheaper(ppo, [FewTexts(1, 100, 1.0), FewTexts(3, 200, 1.1), FewTexts(9, 900, 1.15)])


def learned(ratio: Interval, over_fastest: Interval) -> Learned:
    """Return the row of an arm with these ratios."""
    own: dict[str, Any] = {"seeds": [1.0], "train_seconds": 1.0, "forwards": 10_000, "chosen": "ppo-0"}
    return Learned(ratio=ratio, over_pair=ratio, over_fastest=over_fastest, **own)


def test_interval_is_over_texts_and_seeds() -> None:
    """Texts differ much more than seeds do: an interval over seeds alone would be far too narrow."""
    rng = np.random.default_rng(0)
    static = rng.uniform(1, 3, 30)
    arm = static / rng.normal(1.1, 0.15, 30) * rng.normal(1, 0.002, (8, 30))
    found = over_texts_and_seeds(arm, static[None])
    rates = static.sum() / arm.sum(1)
    assert found.value == pytest.approx(np.sort(rates)[2:6].mean())
    assert found.low < found.value < found.high and found.high - found.low > 10 * np.ptp(rates)
    noisy = static[None] / 1.1 * rng.normal(1, 0.2, (8, 1))
    over = over_texts_and_seeds(noisy, static[None])
    assert over.high - over.low > 0.1  # the texts are alike, the seeds are not


def test_an_arm_over_itself_is_one_on_all_texts() -> None:
    seconds = np.random.default_rng(0).uniform(1, 3, (1, 20))
    assert over_texts_and_seeds(seconds, seconds) == Interval(1.0, 1.0, 1.0)


def test_ranking_names_only_what_paired_intervals_tell() -> None:
    one = Interval(1.0, 1.0, 1.0)
    rows = {
        "a": learned(one, one),
        "b": learned(one, Interval(0.99, 0.97, 1.01)),
        "c": learned(one, Interval(0.95, 0.93, 0.97)),
    }
    line = ranking(cast(Findings, SimpleNamespace(replay=rows)))[1]
    assert line.startswith(
        "`a` is the fastest arm. Slower, by intervals of paired differences over texts and seeds: `c`."
    )
    assert "Not told from it: `b`." in line and "a difference of 2.9 % is told" in line
