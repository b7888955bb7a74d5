"""The trace that a run learns from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spec_envs import ENVIRONMENTS, recordings
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.traces.plan import Plan, default_folder
from spec_envs.experiments.traces.record import is_recorded, recorded_by_default


def plan_of(config: Mapping[str, Any]) -> Plan:
    """Return the plan of the trace that is recorded for a run with these settings."""
    train, validation, test = config["record"]
    return Plan(config["id"], config["env"], (train, validation, test))


def trace_of(folder: Path, config: Mapping[str, Any]) -> Trace | PortfolioTrace:
    """Return the trace that a run in a folder learns from: the one that its settings name, or one recorded for it."""
    if config["env"].get("trace"):
        return recordings.exact(config["env"]["trace"])
    return recorded_by_default(plan_of(config), root_of(folder))


def root_of(folder: Path) -> Path:
    """Return the folder of all runs: a run lies in ENV/STANZA-SEED below it, and a stage of one in NUMBER-ENV below
    that."""
    is_stage = folder.name.partition("-")[2] in ENVIRONMENTS
    return folder.parents[2 if is_stage else 1]


def known_trace(folder: Path, config: Mapping[str, Any]) -> Trace | PortfolioTrace | None:
    """Return the trace that a run has learned from; None if it has none any more. Nothing is recorded."""
    if config["env"].get("trace"):
        named = config["env"]["trace"]
        return recordings.exact(named) if recordings.is_exact(named) else None
    if not config.get("record") or not is_recorded(plan_of(config), root_of(folder)):
        return None
    return recordings.exact(str(default_folder(plan_of(config), root_of(folder))))
