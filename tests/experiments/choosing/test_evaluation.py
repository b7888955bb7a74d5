"""A run of SpecDrafter-v0 ends with a table of everything that an agent has to beat."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from spec_envs import agents
from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.drafters.portfolio import Portfolio
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.decoding.tree import NEVER
from spec_envs.experiments import evaluate, train
from spec_envs.experiments.choosing.equality import replay_equals_live
from spec_envs.experiments.choosing.evaluation import Setting
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.measure.results import Best
from tests.support.recordings import costs_of

if TYPE_CHECKING:
    from spec_envs.experiments.traces.plan import Plan

SMALL = {
    "record": "[]",
    "test_prompts": 2,
    "total_timesteps": 128,
    "hyperparameters.num_envs": 4,
    "hyperparameters.n_steps": 16,
    "hyperparameters.batch_size": 32,
    "env.max_new_tokens": 12,
    "env.prompts": "all",
}


@pytest.fixture(scope="module")
def run(portfolio: PortfolioTrace, portfolio_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small run of the default stanza, which learns from a trace and is measured live."""
    clock = costs_of(portfolio, tmp_path_factory.mktemp("costs"))
    models = {name: portfolio_plan.env[name] for name in ("target", "device", "dtype", "drafter", "width")}
    sizes = {name: list(portfolio_plan.env[name]) for name in ("sizes", "depths")}
    env = {
        f"env.{name}": value for name, value in (models | sizes | {"trace": portfolio.folder, "clock": clock}).items()
    }
    given = [f"{name}={str(value).replace(' ', '')}" for name, value in (env | SMALL).items()]
    experiment = load_experiment("SpecDrafter-v0", "ppo", [*given, "eval_env.trace=null"])
    folder = tmp_path_factory.mktemp("runs") / "SpecDrafter-v0" / "ppo-0"
    train.run(experiment, "SpecDrafter-v0", "ppo", 0, folder)
    return folder


def test_table_has_every_reference(run: Path, portfolio: PortfolioTrace) -> None:
    found = json.loads((run / "results.json").read_text())
    singles = {f"{name}:{size}" for name in portfolio.traces for size in (1, 2, 5)}
    arms = {"plain", "random", "static", "fixed order", "hedge", "ucb-drafter", "hindsight", "ppo", "clairvoyant"}
    assert found["static"]["best"][0] in {"plain", *singles}
    for table in (found["arms"], found["switching"]["arms"]):
        assert arms <= set(table) and len(set(table) & singles) >= 3
        fastest = max(row["tokens_per_second"] for row in table.values())
        assert table["clairvoyant"]["tokens_per_second"] == pytest.approx(fastest)
    assert found["replay_equals_live"] is True
    for name in ("over_best_single", "over_fixed_order"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    text = (run / "results.md").read_text()
    assert re.search(r"Best fixed order on training prompts: (lookup|suffix):", text)
    assert "equal those of live decoding" in text


def test_best_choices_are_kept_and_chosen_again_for_other_settings(run: Path) -> None:
    kept = json.loads((run / "static.json").read_text())
    assert kept["fixed_order"]["copier"].startswith(("lookup:", "suffix:"))
    again = evaluate.evaluate_run(run, {"max_new_tokens": 6}, 2)
    assert again.static is not None and again.max_new_tokens == 6
    assert json.loads((run / "static.json").read_text()) == kept


def test_replay_that_differs_from_live_is_found(run: Path, portfolio: PortfolioTrace) -> None:
    """Two replays stand for a live decoder: one of the same texts, and one whose head drafts nothing."""
    control: Any = agents.load(run)[0]
    setting = Setting(portfolio, control, portfolio.costs(), 16, Best(best=["plain"], tokens_per_second={}))
    same, other = (portfolio.decoder(control, WallClock(torch.device("cpu"))) for _ in range(2))
    assert replay_equals_live(setting, same, 40)
    head: Any = cast(Portfolio, other.drafter).drafters[1]
    head.columns = {**head.columns, "log_probs": np.full_like(head.columns["log_probs"], NEVER)}
    assert not replay_equals_live(setting, other, 40)
