"""The class of every registered environment (``SpecDepthEnv``, …): a ``SpecEnv`` with the documentation of its problem.

A class is made at its first use, from its row in ``spec_envs.ENVIRONMENTS``.
"""

from __future__ import annotations

import inspect
from typing import Any

from spec_envs import ENVIRONMENTS, class_name
from spec_envs.controls import CONTROLS
from spec_envs.env import SpecEnv
from spec_envs.settings import documentation, signature


def environment(env_id: str) -> type[SpecEnv]:
    """Make the class of an environment."""
    place = ENVIRONMENTS[env_id]
    kind = CONTROLS[place]

    def __init__(self: SpecEnv, control: str = place, **keywords: Any) -> None:
        SpecEnv.__init__(self, control, **keywords)

    described = {
        "__init__": __init__,
        "__signature__": signature(kind),
        "__doc__": f"{inspect.getdoc(kind)}\n\n## Shared Arguments\n\n{documentation()}\n",
        "__module__": __name__,
    }
    return type(class_name(env_id), (SpecEnv,), described)


def __getattr__(name: str) -> type[SpecEnv]:
    for env_id in ENVIRONMENTS:
        if class_name(env_id) == name:
            globals()[name] = made = environment(env_id)  # made once, because pickled objects refer to it
            return made
    raise AttributeError(f"module {__name__!r} has no class {name!r}; register its environment first")


def __dir__() -> list[str]:
    return sorted({*globals(), *map(class_name, ENVIRONMENTS)})
