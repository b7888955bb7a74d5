"""Ranges of the keyword arguments that environments of every kind share, and where a clock may measure."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

from spec_envs.checked import check_number, choice
from spec_envs.controls.base import Control
from spec_envs.controls.rewards import RATES
from spec_envs.prompts.sets import SPLITS

EPISODES = ("prompt", "cycle")


def check_ranges(kind: type[Control], given: dict[str, Any]) -> None:
    """Refuse values that make no sense for an environment of this kind of control.

    Args:
        given: ``episode``, ``reward``, ``split``, ``max_new_tokens``, ``pace`` and ``policy_seconds``.

    Raises:
        ValueError: one is out of its range, or two do not go together.
    """
    choice("episode", given["episode"], EPISODES)
    choice("reward", given["reward"], list(kind.rewards))
    choice("split", given["split"], (*SPLITS, "all"))
    if given["reward"] in RATES and given["episode"] == "prompt":
        raise ValueError(
            f'reward="{given["reward"]}" needs episode="cycle": summed over a prompt, tokens / seconds would pay for many '
            "cheap cycles instead of fast text"
        )
    first = "2 or more (the first one is the prefill's)"
    check_number("max_new_tokens", given["max_new_tokens"], lambda tokens: tokens >= 2, first)
    if given["pace"] is not None:
        check_number("pace", given["pace"], lambda pace: 0 <= pace <= 1e9, "tokens per second, 0 or more")
    check_number("policy_seconds", given["policy_seconds"], lambda s: 0 <= s <= 1e9, "seconds per decision, 0 or more")


def in_worker() -> bool:
    """Whether other processes of the same work run beside this one: those of multiprocessing, or of a Ray cluster."""
    ray = sys.modules.get("ray")
    on_ray = ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    return on_ray or multiprocessing.parent_process() is not None
