"""Checks of the ``hyperparameters:`` of a stanza against the settings of its agent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spec_envs.agents import AGENTS
from spec_envs.agents.settings import UnfitSetting

SET_BY_RUN = ("seed", "total_timesteps")


def set_by_run(agent: str, seed: int, total_timesteps: int) -> dict[str, int]:
    """Return those hyper-parameters of an agent that its run sets."""
    given = {"seed": seed, "total_timesteps": total_timesteps}
    return {name: value for name, value in given.items() if name in AGENTS[agent].Settings.model_fields}


def check_hyperparameters(agent: str, given: Mapping[str, Any], place: Callable[[tuple[str, ...]], str]) -> None:
    """Refuse hyper-parameters that an agent does not have, and values that it does not take.

    Args:
        place: returns where a key was set.

    Raises:
        ValueError: the message begins with the place.
    """
    for name in set(given) & set(SET_BY_RUN):
        raise ValueError(f"{place(('hyperparameters', name))}: the run sets {name} itself; leave it out here")
    try:
        AGENTS[agent].Settings.read(given, agent, SET_BY_RUN)
    except UnfitSetting as error:
        raise ValueError(f"{place(('hyperparameters', error.name))}: {error}") from None
