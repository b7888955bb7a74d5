"""The benchmark's statistics, and the sentences and rows of its report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spec_envs.decoding.clock import CostTable
from spec_envs.experiments.benchmark.checks import averaged
from spec_envs.experiments.benchmark.findings import FewTexts, Learned
from spec_envs.experiments.benchmark.replay import over_seeds
from spec_envs.experiments.benchmark.report import cheaper
from spec_envs.experiments.measure.report import text_notes
from spec_envs.experiments.measure.results import Divergence, Interval


def test_cost_tables_are_averaged() -> None:
    tables = [CostTable("now", {1: s, 8: 2 * s}, {1: s / 10}) for s in (1.0, 2.0, 6.0)]
    mean = averaged(tables)
    assert (mean.name, mean.verify, mean.draft) == ("now", {1: 3.0, 8: 6.0}, {1: pytest.approx(0.3)})


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
    ppo = Learned(
        ratio=Interval(least, least, least), seeds=[least], train_seconds=1.0, forwards=10_000, chosen="ppo-0"
    )
    assert sentence in cheaper(ppo, [FewTexts(1, 100, 1.0), FewTexts(3, 200, 1.1), FewTexts(9, 900, 1.15)])


def test_over_seeds_is_interquartile_mean() -> None:
    row = over_seeds(np.array([0.0, 1.0, 1.1, 1.2, 1.3, 1.2, 1.1, 9.0]))
    assert row.value == pytest.approx(1.15)
    assert row.low <= row.value <= row.high
    assert over_seeds(np.array([1.0, 3.0])).high == 3.0
