"""The function that ``gym.make_vec`` calls. It makes environments in NumPy if a trace is replayed, else single ones
side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from spec_envs import ENVIRONMENTS
from spec_envs.controls import CONTROLS
from spec_envs.recordings import is_exact
from spec_envs.vector.env import UNUSED, ReplayVectorEnv, autoreset, check_count

# Arguments of gym.make whose wrappers are for single environments
OF_MAKE = ("max_episode_steps", "disable_env_checker")


def make_vector(
    control: str,
    num_envs: int = 1,
    autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
    **keywords: Any,
) -> VectorEnv:
    """Return ``num_envs`` environments of a control.

    A recorded trace is replayed in NumPy (``ReplayVectorEnv``), unless a keyword is given that is not supported there:
    ``render_mode``, ``switch_every``, ``adjustment_interval``, or ``max_episode_steps`` of ``gym.make``. Then, and
    without a recorded trace, the result is Gymnasium's ``SyncVectorEnv`` of single environments.

    Args:
        control: name of a control, or ``"module:Class"``.
        autoreset_mode: ``"SameStep"``, ``"NextStep"`` or ``"Disabled"``, or Gymnasium's ``AutoresetMode``.
        keywords: those of ``SpecEnv``.

    Raises:
        TypeError, ValueError: as for ``SpecEnv``.
    """
    mode = autoreset(autoreset_mode)
    trace = keywords.get("trace")
    in_numpy = isinstance(trace, str) and is_exact(trace)
    if in_numpy and not any(keywords.get(name) for name in (*UNUSED, *OF_MAKE)):
        return ReplayVectorEnv(control, num_envs, autoreset_mode=mode, **keywords)
    env_id = next(env_id for env_id in ENVIRONMENTS if CONTROLS[env_id] is CONTROLS[control])
    check_count(num_envs)
    return SyncVectorEnv([partial(gym.make, env_id, **keywords)] * num_envs, autoreset_mode=mode)
