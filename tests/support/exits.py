"""Environments and agents at the exit of a tiny target."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from spec_envs.agents import AGENTS
from spec_envs.agents.exits.online import OnlineAgent
from spec_envs.agents.exits.replay import Segment
from spec_envs.controls import make_control

EXIT: dict[str, Any] = {"exit_layer": 3, "prompts": "mt_bench", "drafter": "auto"}


def make_exit_agent(
    tiny: dict, name: str, kind: str, env: dict | None = None, **own: Any
) -> tuple[gym.Env, OnlineAgent]:
    """Return an environment with an early exit, and the named agent for it."""
    drawn = {"draft_temperature": 1.0} if name == "reinforce" else {}
    keywords = {**tiny, **EXIT, "adapter": kind, "rank": 4, **drawn, **(env or {})}
    made = AGENTS[name](control=make_control("dvi", keywords), **{"fast_batch": 16, "replay_batch": 16, **own})
    return gym.make("SpecDVI-v0", **keywords), made


def collect_segments(env: gym.Env, agent: OnlineAgent, count: int) -> list[Segment]:
    """Return the verified rows of a few texts; the agent is bound to the environment."""
    rows: list[Segment] = []
    agent.fast_update = lambda segments: rows.extend(segments) or (0.0, None)  # type: ignore[method-assign]
    agent.settings = agent.settings.model_copy(update={"replay_batch": 0, "texts": count})
    agent.learn(10**6, env)
    del agent.fast_update  # type: ignore[method-assign]
    return rows
