"""Gymnasium environments that control speculative decoding of a live language model."""

import gymnasium as gym

from spec_envs.generate import Generation, generate

__all__ = ["ENVIRONMENTS", "Generation", "generate"]
from spec_envs.version import __version__

ENVIRONMENTS = {"SpecDepth-v0": "depth", "SpecBudget-v0": "budget"}

for _id, _control in ENVIRONMENTS.items():
    gym.register(_id, entry_point="spec_envs.env:SpecEnv", kwargs={"control": _control}, nondeterministic=True)
