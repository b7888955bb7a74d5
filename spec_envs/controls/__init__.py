"""Control problems by name."""

from __future__ import annotations

import inspect
from typing import Any

from spec_envs.controls.base import Agent, Control, Policy
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.dvi import DVIControl
from spec_envs.controls.k import KControl
from spec_envs.controls.topk import TopKControl
from spec_envs.controls.tree import TreeControl

__all__ = ["CONTROLS", "Agent", "Control", "Policy", "make_control"]

CONTROLS: dict[str, type[Control]] = {
    "depth": DepthControl,
    "budget": BudgetControl,
    "tree": TreeControl,
    "k": KControl,
    "topk": TopKControl,
    "dvi": DVIControl,
}


def make_control(name: str, keywords: dict[str, Any]) -> Control:
    """A control from an environment's keyword arguments, of which it takes its own."""
    kind = CONTROLS[name]
    own = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in keywords.items() if key in own})
