"""All arms of a table have one price list."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.benchmark.arms import PRICES, Problem, samples_of, train, trained_policy
from spec_envs.experiments.traces.plan import Plan
from spec_envs.files import write_json
from tests.support.recordings import COSTS, sizes


@pytest.fixture
def problems(traces: dict[str, Trace], plans: dict[str, Plan], tmp_path: Path) -> list[Problem]:
    """Return the same problem under two price lists; the verifications of the second cost three times as much."""
    env: dict[str, Any] = {"max_new_tokens": 20, **sizes(plans["tree"])}
    found = []
    for name, factor in (("first", 1.0), ("second", 3.0)):
        verify = {n: s * (factor if n > 1 else 1) for n, s in COSTS["verify"].items()}
        write_json(tmp_path / f"{name}.json", {**COSTS, "verify": verify})
        found.append(Problem("SpecTree-v0", env, str(traces["tree"].folder), str(tmp_path / f"{name}.json")))
    return found


def test_arms_are_trained_and_scored_under_the_prices_of_their_table(
    problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm is refused where it would be scored under other prices than it was trained under."""
    tables = []
    for problem, other in (problems, problems[::-1]):
        folder = str(tmp_path / Path(problem.prices).stem)
        train(problem, "hindsight", 0, 0, folder)
        assert CostTable.load(str(Path(folder) / PRICES)).curves == problem.table.curves
        assert problem.environments(2).clocks[0].table.curves == problem.table.curves
        policy = trained_policy(folder, problem)
        assert policy.control.costs is problem.table
        seconds = [sample.seconds for sample in samples_of(problem, policy, "test")]
        with pytest.raises(ValueError, match="was trained under other prices than the table has"):
            trained_policy(folder, other)
        with pytest.raises(ValueError, match="was trained under other prices"):
            train(other, "hindsight", 0, 0, folder)
        foreign = trained_policy(folder, problem, foreign=other.table)
        assert foreign.control.costs is other.table
        tables.append(seconds)
    assert sum(tables[1]) > sum(tables[0])


def test_an_arm_without_its_prices_is_not_taken_for_one_of_the_table(problems: list[Problem], tmp_path: Path) -> None:
    train(problems[0], "hindsight", 0, 0, str(tmp_path / "arm"))
    file = tmp_path / "arm" / PRICES
    content = json.loads(file.read_text())
    content["draft"] = {n: 2 * s for n, s in content["draft"].items()}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="other prices"):
        trained_policy(str(tmp_path / "arm"), problems[0])
    assert trained_policy(str(tmp_path / "arm"), replace(problems[0], prices=str(file)))
