"""The agent zoo: everything here has Stable-Baselines3's ``predict``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spec_envs.agents.exits.policy import ExitPolicy as ExitPolicy
    from spec_envs.agents.loading import load as load
    from spec_envs.agents.loading import read_config as read_config
    from spec_envs.agents.registry import AGENTS as AGENTS
    from spec_envs.agents.registry import SHIPPED as SHIPPED
    from spec_envs.agents.rules.adaptive_k import AdaptiveSpecController as AdaptiveSpecController
    from spec_envs.agents.rules.adaptive_k import SpecConfig as SpecConfig
    from spec_envs.agents.sb3.agent import SB3Agent as SB3Agent
    from spec_envs.agents.sb3.vec_env import ReplayVecEnv as ReplayVecEnv
    from spec_envs.agents.selector.adapter import RLNetworkAdapter as RLNetworkAdapter

MODULES = {  # of what is imported from here when it is first asked for: most of it loads torch
    "AGENTS": "registry",
    "AdaptiveSpecController": "rules.adaptive_k",
    "ExitPolicy": "exits.policy",
    "RLNetworkAdapter": "selector.adapter",
    "ReplayVecEnv": "sb3.vec_env",
    "SB3Agent": "sb3.agent",
    "SpecConfig": "rules.adaptive_k",
    "SHIPPED": "registry",
    "load": "loading",
    "read_config": "loading",
}
__all__ = [
    "AGENTS",
    "SHIPPED",
    "AdaptiveSpecController",
    "ExitPolicy",
    "RLNetworkAdapter",
    "ReplayVecEnv",
    "SB3Agent",
    "SpecConfig",
    "load",
    "read_config",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(f"{__name__}.{MODULES[name]}"))[name]
