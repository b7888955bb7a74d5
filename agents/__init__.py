"""The agent zoo: everything here has Stable-Baselines3's ``predict``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from agents.fixed import FixedAgent
from agents.random import RandomAgent
from agents.sb3 import ALGORITHMS, SB3Agent
from spec_envs import ENVIRONMENTS
from spec_envs.controls import Control, make_control

AGENTS: dict[str, Callable[..., Any]] = {
    "random": RandomAgent,
    "fixed": FixedAgent,
    **{name: partial(SB3Agent, algorithm=name) for name in ALGORITHMS},
}


def load(run: str | Path) -> tuple[Control, Any]:
    """The control and the trained agent of a run folder, the pair that ``spec_envs.generate`` takes.

    Raises:
        ValueError: the folder is not a run, or its files cannot be read; the sentence says which.
    """
    folder = Path(run)
    config = read_config(folder)
    control = make_control(ENVIRONMENTS[config["id"]], config["env"])
    if config.get("partner"):
        control.compose(*load(config["partner"]))
    agent = AGENTS[config["agent"]](control=control, **config["hyperparameters"])
    agent.load(folder)
    return control, agent


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
