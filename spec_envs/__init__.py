"""Gymnasium environments that control speculative decoding of a live language model."""

import gymnasium as gym

from spec_envs.generate import Generation, generate
from spec_envs.version import __version__

__all__ = ["ENVIRONMENTS", "Generation", "__version__", "generate"]

ENVIRONMENTS = {
    "SpecDepth-v0": "depth",
    "SpecBudget-v0": "budget",
    "SpecTree-v0": "tree",
    "SpecK-v0": "k",
    "SpecTopK-v0": "topk",
    "SpecDVI-v0": "dvi",
}

REPLAYED = ("depth", "budget", "tree", "k")  # controls that a trace is replayed for in NumPy

for _id, _control in ENVIRONMENTS.items():
    gym.register(
        _id,
        entry_point="spec_envs.env:SpecEnv",
        vector_entry_point="spec_envs.vector.make:make_vector" if _control in REPLAYED else None,
        kwargs={"control": _control},
        nondeterministic=True,
    )
