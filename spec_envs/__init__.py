"""Gymnasium environments that control speculative decoding of a live language model.

Importing this package registers the environments and nothing else: models, agents and PyTorch are loaded when they are
used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from spec_envs.version import __version__

if TYPE_CHECKING:
    from spec_envs import agents
    from spec_envs.decoding.loading import load_decoder
    from spec_envs.decoding.weights.checkpoints import load_tokenizer
    from spec_envs.generation import Generation, generate

__all__ = [
    "ENVIRONMENTS",
    "Generation",
    "__version__",
    "agents",
    "generate",
    "load_decoder",
    "load_tokenizer",
    "register",
]

ENVIRONMENTS: dict[str, str] = {}  # by id, where the control of an environment is found: "module:Class"

PLACES = {  # modules of what is found from here when it is first used
    "Generation": "spec_envs.generation",
    "generate": "spec_envs.generation",
    "load_decoder": "spec_envs.decoding.loading",
    "load_tokenizer": "spec_envs.decoding.weights.checkpoints",
}


def register(env_id: str, control: str, replayed: bool = False) -> None:
    """Register a problem as an environment of Gymnasium, which imports its control only when it makes one.

    Args:
        env_id: such as ``"SpecDepth-v0"``.
        control: where its control is found, ``"module:Class"``.
        replayed: True if recorded traces replay it (its control has a ``trace_kind``); then ``gym.make_vec`` can step
            thousands of episodes at once in NumPy.

    Raises:
        ValueError: ``control`` is not of the form ``"module:Class"``.
    """
    module, colon, name = control.partition(":")
    if not (module and colon and name):
        raise ValueError(f'control is {control!r}; expected "module:Class", such as "my_package.toy:ToyControl"')
    gym.register(
        env_id,
        entry_point=f"spec_envs.environments:{class_name(env_id)}",
        vector_entry_point="spec_envs.vector.make:make_vector" if replayed else None,
        kwargs={"control": control},
        nondeterministic=True,
    )
    ENVIRONMENTS[env_id] = control


def class_name(env_id: str) -> str:
    """Return the name of an environment's class in ``spec_envs.environments``: ``"SpecDepthEnv"`` for
    ``"SpecDepth-v0"``."""
    name = "".join(letter for letter in env_id.removesuffix("-v0") if letter.isalnum())
    return f"{name}Env"


def __getattr__(name: str) -> Any:
    if name == "agents":
        return importlib.import_module("spec_envs.agents")
    if name in PLACES:
        return getattr(importlib.import_module(PLACES[name]), name)
    raise AttributeError(f"module 'spec_envs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register("SpecDepth-v0", "spec_envs.controls.depth:DepthControl", replayed=True)
register("SpecBudget-v0", "spec_envs.controls.budget:BudgetControl", replayed=True)
register("SpecTree-v0", "spec_envs.controls.tree:TreeControl", replayed=True)
register("SpecK-v0", "spec_envs.controls.k:KControl", replayed=True)
register("SpecDrafter-v0", "spec_envs.controls.drafter:DrafterControl", replayed=True)
register("SpecTopK-v0", "spec_envs.controls.topk:TopKControl")
register("SpecDVI-v0", "spec_envs.controls.dvi:DVIControl")
