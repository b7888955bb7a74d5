"""The agent zoo: everything here has Stable-Baselines3's ``predict``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from agents.adaedl import AdaedlAgent
from agents.adaptive_k import AdaptiveKAgent
from agents.confidence import ConfidenceAgent
from agents.ddd import DddAgent
from agents.dvi import DVIAgent
from agents.exact_pg import ExactPGAgent
from agents.expected_gain import ExpectedGainAgent
from agents.fixed import FixedAgent
from agents.gammatune import GammaTuneAgent
from agents.hf_schedule import ScheduleAgent
from agents.hindsight import HindsightAgent
from agents.online import OnlineAgent
from agents.random import RandomAgent
from agents.reinforce import ReinforceAgent
from agents.rl_adapter import Settings
from agents.rl_adapter_agent import RLAdapterAgent
from agents.sb3 import ALGORITHMS, RESERVED, SB3Agent
from agents.specdec_plus import SpecDecPlusAgent
from agents.svip import SvipAgent
from agents.svip_tree import SvipTreeAgent
from agents.traced import TracedAgent
from agents.tree_rule import PricedRule
from agents.ucb import UcbAgent
from agents.ucb_budget import UcbBudgetAgent
from spec_envs import ENVIRONMENTS
from spec_envs.controls import Control, make_control
from spec_envs.controls.opening import clocks_for
from spec_envs.decoding.clock import CostTable, PricedClock

SHIPPED = Path(__file__).parent / "shipped"  # trained agents by environment, of `make benchmark`
ONLINE: dict[str, type[OnlineAgent]] = {"reinforce": ReinforceAgent, "dvi": DVIAgent}
AGENTS: dict[str, Callable[..., Any]] = {
    "random": RandomAgent,
    "fixed": FixedAgent,
    "adaptive-k": AdaptiveKAgent,
    "hf-schedule": ScheduleAgent,
    "confidence": ConfidenceAgent,
    "svip": SvipAgent,
    "adaedl": AdaedlAgent,
    "gammatune": GammaTuneAgent,
    "ucb": UcbAgent,
    "ucb-budget": UcbBudgetAgent,
    "specdec++": SpecDecPlusAgent,
    "ddd": DddAgent,
    "svip-tree": SvipTreeAgent,
    "expected-gain": ExpectedGainAgent,
    "hindsight": HindsightAgent,
    "exact-pg": ExactPGAgent,
    "rl-adapter": RLAdapterAgent,
    **ONLINE,
    **{name: partial(SB3Agent, algorithm=name) for name in ALGORITHMS},
}


def load(run: str | Path) -> tuple[Control, Any]:
    """The control and the trained agent of a run folder, the pair that ``spec_envs.generate`` takes; by an environment's
    id the agent that is shipped for it.

    Raises:
        ValueError: the folder is not a run, or its files cannot be read; the sentence says which.
    """
    folder = SHIPPED / run if str(run) in ENVIRONMENTS else Path(run)
    config = read_config(folder)
    control = make_control(ENVIRONMENTS[config["id"]], config["env"])
    if config.get("partner"):
        control.compose(*load(config["partner"]))
    agent = AGENTS[config["agent"]](control=control, **config["hyperparameters"])
    if control.cost_features or isinstance(agent, (PricedRule, HindsightAgent)):
        control.costs = cost_table(folder, config["env"])
    agent.load(folder)
    return control, agent


def cost_table(folder: Path, env: dict[str, Any]) -> CostTable:
    """The table that a run's training was priced with (the first of several)."""
    if (folder / "clock.json").exists():
        return CostTable.load(str(folder / "clock.json"))
    clock = clocks_for(env.get("clock", "wall"), "cpu", env.get("trace"))[0]
    if not isinstance(clock, PricedClock):
        raise ValueError(f"{folder} was trained on a measured clock, which has no cost table to show")
    return clock.table


def parameters(name: str) -> set[str]:
    """Every keyword argument of an agent."""
    known = set(inspect.signature(AGENTS[name]).parameters)
    if name in ALGORITHMS:
        known |= set(inspect.signature(ALGORITHMS[name]).parameters) - RESERVED
    if name in ONLINE:
        known |= set(inspect.signature(OnlineAgent).parameters)
    if name in ("hindsight", "exact-pg"):
        known |= set(inspect.signature(TracedAgent).parameters) - {"outputs", "activation", "hyperparameters"}
    if name == "rl-adapter":
        known |= {field.name for field in fields(Settings)}
    return known


def known_hyperparameters(name: str) -> set[str]:
    """What may stand under ``hyperparameters:`` for an agent."""
    own = {"control", "algorithm", "hyperparameters", "online", "seed", "total_timesteps"}
    return parameters(name) - own


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration of a run folder."""
    path = folder / "config.yml"
    try:
        config = yaml.safe_load(path.read_text())
        if missing := {"id", "env", "agent", "hyperparameters"} - set(config):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if config["agent"] not in AGENTS or config["id"] not in ENVIRONMENTS:
            raise ValueError(f"it names the unknown agent {config['agent']!r} or environment {config['id']!r}")
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{folder} is not a readable run folder ({reason}); expected one written by `make train`"
        ) from None
    return config
