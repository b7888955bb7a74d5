"""Learning to Draft in the benchmark: two policies that are trained in turn on the benchmark's trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from spec_envs.experiments.benchmark import replay
from spec_envs.experiments.benchmark.arms import Problem, Training, samples_of, train, trained_policy
from spec_envs.experiments.benchmark.problems import FAST, LTD
from spec_envs.experiments.traces.plan import Plan
from spec_envs.files import write_json
from tests.support.recordings import COSTS, recorded_at_costs, sizes

STEPS = 128


@pytest.fixture(scope="module")
def problem(plans: dict[str, Plan], tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """Return SpecDepth-v0 on a trace of the tiny models whose held-out texts are of the final split."""
    trace = recorded_at_costs(replace(plans["tree"], held_out="final"), tmp_path_factory.mktemp("trace"))
    prices = tmp_path_factory.mktemp("prices") / "clock.json"
    write_json(prices, COSTS)
    env: dict[str, Any] = {"max_new_tokens": 20, **sizes(plans["tree"])}
    return Problem("SpecDepth-v0", env, str(trace.folder), str(prices))


@pytest.fixture(scope="module")
def made(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Training]:
    """Return the folder and the cost of a training of few steps."""
    folder = tmp_path_factory.mktemp("arm")
    return folder, train(problem, LTD, 0, STEPS, str(folder))


def test_arm_decides_depth_and_budget_in_every_problem_of_trees(problem: Problem, made: tuple[Path, Training]) -> None:
    folder, trained = made
    for env_id in ("SpecDepth-v0", "SpecBudget-v0", "SpecTree-v0"):
        own = replace(problem, env_id=env_id)
        policy = trained_policy(str(folder), own)
        assert policy.control.costs is own.table
        partner = policy.control.partner
        assert partner and {policy.control.env_id, partner.control.env_id} == {"SpecDepth-v0", "SpecBudget-v0"}
        samples = samples_of(own, policy, "final")
        assert samples and all(sample.seconds > 0 for sample in samples)
        assert train(own, LTD, 0, STEPS, str(folder)) == trained  # it is not trained again
    # of the budget policy every decision is a cycle, of the depth policy some continue one
    assert 3 * STEPS < trained.forwards < 5 * STEPS


def test_stages_learn_on_the_trace_under_the_prices_of_the_table(problem: Problem, made: tuple[Path, Training]) -> None:
    configs = [yaml.safe_load(path.read_text()) for path in sorted(made[0].glob("*/config.yml"))]
    assert [config["id"] for config in configs] == ["SpecBudget-v0", "SpecDepth-v0"] * 2 + ["SpecBudget-v0"]
    for config in configs:
        assert (config["env"]["trace"], config["env"]["clock"]) == (problem.trace, problem.prices)
        assert config["env"]["observation"] == config["env"]["reward"] == "ltd" and config["eval_freq"] > 0
        assert config["env"]["max_new_tokens"] == 20 and config["eval_prompts"] == 1


def test_arm_under_other_prices_is_refused(problem: Problem, made: tuple[Path, Training], tmp_path: Path) -> None:
    write_json(tmp_path / "clock.json", COSTS | {"verify": {1: 1e-3, 50: 9e-3}})
    other = replace(problem, prices=str(tmp_path / "clock.json"))
    with pytest.raises(ValueError, match="was trained under other prices"):
        train(other, LTD, 0, STEPS, str(made[0]))
    with pytest.raises(ValueError, match="was trained under other prices"):
        trained_policy(str(made[0]), other)


def test_arm_is_trained_once_for_all_problems_of_a_trace(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has fewer seeds than other arms, and none where chains are drafted."""
    jobs: list[tuple[Any, ...]] = []

    def mapped(work: Any, given: list[tuple[Any, ...]], desc: str) -> None:
        jobs.extend(given)
        raise InterruptedError

    monkeypatch.setattr(replay, "mapped", mapped)
    size, folders = replace(FAST, seeds=4, ltd_seeds=2), []
    for env_id in ("SpecDepth-v0", "SpecTree-v0", "SpecK-v0"):
        jobs.clear()
        with pytest.raises(InterruptedError):
            replay.trained(replace(problem, env_id=env_id), env_id, size, tmp_path / env_id)
        assert sum(arm == "ppo" for _, arm, *_ in jobs) == 4
        folders.append([folder for _, arm, *_, folder in jobs if arm == LTD])
    home = Path(problem.prices).parent
    assert folders == [[str(home / f"{LTD}-{seed}") for seed in range(2)]] * 2 + [[]]
