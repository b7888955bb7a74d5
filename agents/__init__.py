"""The agent zoo: everything here has Stable-Baselines3's ``predict``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from spec_envs import ENVIRONMENTS, recordings
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.agents.exits.dvi import DVIAgent
from spec_envs.agents.exits.online import OnlineAgent
from spec_envs.agents.exits.reinforce import ReinforceAgent
from spec_envs.agents.rules.adaedl import AdaedlAgent
from spec_envs.agents.rules.adaptive_k import AdaptiveKAgent
from spec_envs.agents.rules.confidence import ConfidenceAgent
from spec_envs.agents.rules.ddd import DddAgent
from spec_envs.agents.rules.expected_gain import ExpectedGainAgent
from spec_envs.agents.rules.gammatune import GammaTuneAgent
from spec_envs.agents.rules.hf_schedule import ScheduleAgent
from spec_envs.agents.rules.specdec_plus import SpecDecPlusAgent
from spec_envs.agents.rules.svip import SvipAgent
from spec_envs.agents.rules.svip_tree import SvipTreeAgent
from spec_envs.agents.rules.tree_base import PricedRule
from spec_envs.agents.rules.ucb import UcbAgent
from spec_envs.agents.rules.ucb_budget import UcbBudgetAgent
from spec_envs.agents.sb3.agent import ALGORITHMS, RESERVED, SB3Agent
from spec_envs.agents.selector.adapter import Settings
from spec_envs.agents.selector.agent import RLAdapterAgent
from spec_envs.agents.traced.base import TracedAgent
from spec_envs.agents.traced.exact_pg import ExactPGAgent
from spec_envs.agents.traced.hindsight import HindsightAgent
from spec_envs.controls import CONTROLS, Control, make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.sealed import first_line, number_of, read_sealed
from spec_envs.settings import check_keywords
from spec_envs.yaml_text import parse_yaml

CONFIG = "config.yml"

SHIPPED = Path(__file__).parent / "shipped"  # trained agents by environment, of `make benchmark`
DECISION = "decision.json"  # in a run: the seconds that it charges for a decision
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
    return load_beside(SHIPPED / run if str(run) in ENVIRONMENTS else Path(run), ())


def load_beside(folder: Path, partners: tuple[Path, ...]) -> tuple[Control, Any]:
    """The same of a run that is itself the partner of others."""
    config = read_config(folder)
    if folder.resolve() in partners:
        raise ValueError(f"{folder / CONFIG} is its own partner, by way of {len(partners)} runs")
    try:
        check_keywords(CONTROLS[config["id"]], config["env"])
        control = make_control(config["id"], config["env"])
        agent = AGENTS[config["agent"]](control=control, **config["hyperparameters"])
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{folder / CONFIG} has settings that cannot be built: {first_line(error)}") from None
    if config.get("partner"):
        control.compose(*load_beside(Path(config["partner"]), (*partners, folder.resolve())))
    if needs_costs(control, agent):
        control.costs = cost_table(folder, config["env"])
    agent.load(folder)
    note = folder / DECISION
    if note.exists():
        seconds = read_sealed(note, remedy := "delete it to measure again")
        agent.decision_seconds = number_of(seconds, "seconds", note, remedy)
    return control, agent


def needs_costs(control: Control, agent: Any) -> bool:
    """Whether a policy looks at what forwards cost."""
    return control.cost_features or isinstance(agent, (PricedRule, HindsightAgent))


def cost_table(folder: Path, env: dict[str, Any]) -> CostTable:
    """The table that a run's training was priced with (the first of several).

    Raises:
        ValueError: there is none, or it is damaged.
    """
    table = folder / "clock.json"
    if table.exists():
        read_sealed(table, "delete it to measure again")
        return CostTable.load(str(table))
    recording = recordings.load(env["trace"]) if env.get("trace") is not None else None
    clock = recordings.clocks_for(env.get("clock", "wall"), "cpu", recording)[0]
    if not isinstance(clock, PricedClock):
        raise ValueError(
            f"{folder} has a measured clock, and its policy weighs tokens against the seconds of a cost table; leave out "
            "calibrate=false, or name a table in env.clock"
        )
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
    path = folder / CONFIG
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no keys")
        if missing := {"id", "env", "agent", "hyperparameters"} - set(config):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if config["agent"] not in AGENTS or config["id"] not in ENVIRONMENTS:
            raise ValueError(f"it names the unknown agent {config['agent']!r} or environment {config['id']!r}")
        for key in ("env", "hyperparameters"):
            if not isinstance(config[key], dict) or not all(isinstance(name, str) for name in config[key]):
                raise ValueError(f"{key} holds no keys")
    except (OSError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{folder} is not a readable run folder ({reason} in {CONFIG}); expected one written by `make train`"
        ) from None
    return config
