"""A trained agent from its run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spec_envs import ENVIRONMENTS, recordings
from spec_envs.agents.base import Agent
from spec_envs.agents.registry import AGENTS, SHIPPED
from spec_envs.agents.yaml_text import parse_yaml
from spec_envs.controls import CONTROLS, Control, make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.sealed import first_line, number_of, read_sealed
from spec_envs.settings import check_keywords

CONFIG = "config.yml"
DECISION = "decision.json"  # in a run: the seconds that it charges for a decision


def load(run: str | Path) -> tuple[Control, Agent]:
    """Return the control and the trained agent of a run folder, the pair that ``spec_envs.generate`` takes; for an
    environment's id, those of the agent that is shipped for it.

    Raises:
        ValueError: the folder is not a run, or its files cannot be read; the message names which.
    """
    return load_beside(folder_of(run), ())


def folder_of(run: str | Path) -> Path:
    """Return the folder of a run; for an environment's id, that of the agent that is shipped for it.

    Raises:
        ValueError: there is no such folder, or no agent is shipped for the environment.
    """
    shipped = sorted(path.name for path in SHIPPED.iterdir())
    if str(run) in shipped:
        return SHIPPED / run
    if str(run) in ENVIRONMENTS:
        raise ValueError(f"no agent is shipped for {run}, only for {', '.join(shipped)}; give the folder of a run")
    if not Path(run).is_dir():
        raise ValueError(
            f"{run} is not a readable run folder (there is no such folder); expected one written by `spec-envs "
            f"train`, or an environment whose agent is shipped: {', '.join(shipped)}"
        )
    return Path(run)


def load_beside(folder: Path, partners: tuple[Path, ...]) -> tuple[Control, Agent]:
    """Return the same for a run that is itself the partner of others.

    Raises:
        ValueError: a run that is its own partner, or files that cannot be read.
    """
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
    if control.cost_features or agent.needs_costs:
        control.costs = cost_table(folder, config["env"])
    agent.load(folder)
    note = folder / DECISION
    if note.exists():
        seconds = read_sealed(note, remedy := "delete it to measure again")
        agent.decision_seconds = number_of(seconds, "seconds", note, remedy)
    return control, agent


def cost_table(folder: Path, env: dict[str, Any]) -> CostTable:
    """Return the cost table that a run's training was priced with (the first of several).

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
            f"{folder} has a measured clock, and its policy weighs tokens against the seconds of a cost table; leave "
            "out calibrate=false, or name a table in env.clock"
        )
    return clock.table


def read_config(folder: Path) -> dict[str, Any]:
    """Return the resolved configuration of a run folder.

    Raises:
        ValueError: it cannot be read, or names an agent or environment that there is not.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a readable run folder (there is no {CONFIG}); expected one written by `spec-envs train`"
        )
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
            f"{folder} is not a readable run folder ({reason} in {CONFIG}); expected one written by `spec-envs train`"
        ) from None
    return config
