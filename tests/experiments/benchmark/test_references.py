"""The static settings that the benchmark compares arms with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.benchmark import replay
from spec_envs.experiments.benchmark.arms import Problem
from spec_envs.experiments.benchmark.problems import FAST
from spec_envs.experiments.measure.bounds import Bounds
from spec_envs.files import write_json
from tests.support.recordings import COSTS


@pytest.mark.parametrize("draft", [1e-9, 1.0])
def test_static_of_a_pair_is_lookup_where_that_is_faster(
    draft: float, traces: dict[str, Trace], tmp_path: Path
) -> None:
    trace, env = traces["copies"], {"max_new_tokens": 20, "k_max": 6, "decision": "token"}
    write_json(
        tmp_path / "costs.json", {"verify": {1: COSTS["verify"][1], 50: COSTS["verify"][1]}, "draft": {1: draft}}
    )
    problem = Problem("SpecK-v0", env, str(trace.folder), str(tmp_path / "costs.json"))
    static, references = replay.bounded(problem, trace, replace(FAST, tokens=20))
    train, test = (
        Bounds(trace, problem.control(), problem.table, trace.of_split(split), 20) for split in ("train", "test")
    )
    k = train.best(train.by_lookup())
    lookup = test.by_lookup()[:, k].sum()
    assert references.lookup == [k] and k > 0
    assert references.lookup_over_static == pytest.approx(static.seconds.sum() / lookup)
    assert references.pair == ([f"lookup:{k}"] if draft == 1 else references.static)
    assert references.pair_over_static == pytest.approx(references.lookup_over_static if draft == 1 else 1.0)
    arm = replay.Arm(None, static.seconds[None], {"settings": {}, "by_domain": 1.0})  # type: ignore[arg-type]
    over: Any = replay.rows_of({"static": arm}, static)["static"].over_pair
    assert over.value == pytest.approx(lookup / static.seconds.sum() if draft == 1 else 1.0)
