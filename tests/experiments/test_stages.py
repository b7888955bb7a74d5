"""Learning to Draft's iteration: policies that are trained in turn on a recorded trace."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spec_envs import agents
from spec_envs.agents.base import Agent
from spec_envs.decoding.traces.replay import ReplayVerifier
from spec_envs.experiments import train
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.validation import Speedup
from tests.support.recordings import COSTS

SPEEDUPS = (1.0, 3.0, 2.0, 0.5)  # of the validations of each stage: the second one is the best
ORDER = ["1-SpecBudget-v0", "2-SpecDepth-v0", "3-SpecBudget-v0", "4-SpecDepth-v0", "5-SpecBudget-v0"]
SMALL = [
    "record=[3,2,0]", "env.prompts=all", "env.max_new_tokens=16", "env.max_depth=3", "env.width=3", "env.budget=6",
    "test_prompts=2", "eval_prompts=2", "total_timesteps=128", "eval_freq=32", "hyperparameters.n_steps=32",
    "hyperparameters.batch_size=16", "hyperparameters.pi_arch=[8]", "hyperparameters.vf_arch=[8]",
]  # fmt: skip
AS_TEXT = {part: {str(n): seconds for n, seconds in curve.items()} for part, curve in COSTS.items()}


@pytest.fixture(scope="module")
def trained(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what became of the published iteration over the tiny models: the folder of all runs, the weights at every
    validation by stage, all weights after each stage, and the decoders of the validations."""
    env = [f"env.{key}={value}" for key, value in tiny.items() if key not in ("clock", "max_new_tokens")]
    experiment = load_experiment("SpecDepth-v0", "ltd-iterative", [*env, *SMALL])
    root = tmp_path_factory.mktemp("runs")
    run = root / "SpecDepth-v0" / "ltd-iterative-0"
    found: dict[str, Any] = {"root": root, "validated": {}, "after": [], "replayed": []}
    speedups, train_one = cycle(SPEEDUPS), train.trained

    def validate(self: Speedup, agent: Agent) -> dict[str, float]:
        measured = measure(self, agent)
        assert measured["speedup"] > 0
        found["replayed"].append(all(isinstance(d.verifier, ReplayVerifier) for d in self.decoders))  # type: ignore[attr-defined]
        found["validated"].setdefault(self.folder.name, []).append(weights_of(agent))
        return {"speedup": next(speedups)}

    def train_and_look(*arguments: Any) -> None:
        train_one(*arguments)
        found["after"].append({path.parent.name: path.read_bytes() for path in run.glob("*/policy.safetensors")})

    measure = Speedup.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spec_envs.experiments.traces.record.costs_of", lambda *_: AS_TEXT)
        patch.setattr(Speedup, "__call__", validate)
        patch.setattr(train, "trained", train_and_look)
        patch.setattr(train, "evaluate_run", lambda folder, *_: found.setdefault("evaluated", folder))
        patch.setattr(train, "save", lambda *_: None)
        train.run_stages(experiment, "ltd-iterative", 0, run)
    return found


def weights_of(agent: Agent) -> dict[str, torch.Tensor]:
    """Return a copy of the weights of an agent of Stable-Baselines3."""
    return {name: tensor.clone() for name, tensor in agent.model.policy.state_dict().items()}  # type: ignore[attr-defined]


def stage(found: dict[str, Any], name: str) -> Path:
    return Path(found["root"]) / "SpecDepth-v0" / "ltd-iterative-0" / name


def test_stages_are_trained_in_order_and_the_last_one_is_evaluated(trained: dict[str, Any]) -> None:
    assert [sorted(weights) for weights in trained["after"]] == [ORDER[: i + 1] for i in range(5)]
    assert trained["evaluated"].name == ORDER[-1]
    configs = [yaml.safe_load((stage(trained, name) / "config.yml").read_text()) for name in ORDER]
    assert [config["hyperparameters"].get("target_kl") for config in configs] == [None, None, 0.02, None, 0.02]
    assert [config["env"].get("depth") for config in configs] == ["random", None, None, None, None]
    assert [config["init"] and Path(config["init"]).name for config in configs] == [None, None, *ORDER[:3]]


def test_partner_is_the_newest_policy_of_the_other_problem_and_stays_as_it_is(trained: dict[str, Any]) -> None:
    partners = [yaml.safe_load((stage(trained, name) / "config.yml").read_text())["partner"] for name in ORDER]
    assert [partner and Path(partner).name for partner in partners] == [None, None, *ORDER[1:4]]
    for earlier, later in zip(trained["after"], trained["after"][1:], strict=False):
        assert earlier.items() <= later.items()  # no stage changes the weights of another one
    control, _ = agents.load(stage(trained, ORDER[-1]))
    assert control.partner and control.partner.control.env_id == "SpecDepth-v0"


def test_best_checkpoint_by_validation_is_kept(trained: dict[str, Any]) -> None:
    best = SPEEDUPS.index(max(SPEEDUPS))
    for name in ORDER:
        validated, kept = trained["validated"][name], weights_of(agents.load(stage(trained, name))[1])
        assert len(validated) == len(SPEEDUPS)
        same = [all(torch.equal(kept[key], old[key]) for key in kept) for old in validated]
        assert same == [i == best for i in range(len(SPEEDUPS))], name


def test_all_stages_learn_and_are_validated_on_one_trace(trained: dict[str, Any]) -> None:
    assert len(trained["replayed"]) == len(ORDER) * len(SPEEDUPS) and all(trained["replayed"])
    assert [path.name.split("-")[-1] for path in (trained["root"] / "traces").iterdir()] == ["tree"]
    tables = {(stage(trained, name) / "clock.json").read_text() for name in ORDER}
    assert len(tables) == 1


def test_finished_stages_are_not_trained_again(trained: dict[str, Any], tiny: dict[str, Any]) -> None:
    env = [f"env.{key}={value}" for key, value in tiny.items() if key not in ("clock", "max_new_tokens")]
    experiment = load_experiment("SpecDepth-v0", "ltd-iterative", [*env, *SMALL])
    folder = stage(trained, "")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("policy.safetensors")}
    _, env_id, last = train.train_stages(experiment, "ltd-iterative", 0, folder)
    assert (env_id, last.name) == ("SpecBudget-v0", ORDER[-1])
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("policy.safetensors")}
