"""Hyper-parameters of the agents of Stable-Baselines3: this project's own, and those of an algorithm's constructor."""

from __future__ import annotations

import functools
import inspect
import math
import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Lt
from pydantic import Field, create_model
from stable_baselines3.common.base_class import BaseAlgorithm

from spec_envs.agents.schedules import ScheduleName
from spec_envs.agents.settings import Amount, Count, Natural, SeededSettings, Share

Frequency = Annotated[
    Count | tuple[Count, Literal["step", "episode"]],
    Field(title='a whole number of 1 or more, or a list like [4, "step"]'),
]
Chance = Annotated[float, Gt(0), Lt(1)]
Layers = Annotated[tuple[Count, ...], Field(title="the sizes of hidden layers, such as [64, 64]")]

RANGES: dict[str, Any] = {  # of arguments of the algorithms; other numbers are 0 or more
    **dict.fromkeys(("gamma", "gae_lambda", "tau", "exploration_fraction"), Share),
    **dict.fromkeys(("exploration_initial_eps", "exploration_final_eps"), Share),
    **dict.fromkeys(("n_steps", "n_epochs", "batch_size", "buffer_size", "target_update_interval"), Count),
    **dict.fromkeys(("cg_max_steps", "line_search_max_iter", "n_critic_updates", "sub_sampling_factor"), Count),
    "stats_window_size": Count,
    **dict.fromkeys(("gradient_steps", "sde_sample_freq"), Annotated[int, Ge(-1)]),
    "train_freq": Frequency,
}
RESERVED = {  # arguments of the algorithms that the agent sets itself, or that are objects, not settings
    *("self", "policy", "env", "seed", "device", "tensorboard_log", "verbose", "policy_kwargs", "learning_rate"),
    *("_init_setup_model", "base", "rollout_buffer_class", "rollout_buffer_kwargs"),
    *("replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage"),
}


class SB3Settings(SeededSettings):
    """The hyper-parameters that all algorithms share."""

    total_timesteps: Count = Field(1, description="steps that the learning-rate schedule spans")
    learning_rate: Amount = Field(3e-4, description="largest learning rate of the schedule")
    lr_schedule: ScheduleName = Field("constant", description="schedule of the learning rate")
    warmup_timesteps: Natural | None = Field(
        None, description='steps until "adawm" reaches the largest rate; by default 1 % of all'
    )
    pi_arch: Layers = Field(
        (64, 64), description="hidden layers of the policy, or of a value-based algorithm's network"
    )
    vf_arch: Layers = Field((64, 64), description="hidden layers of the value network")
    activation: Literal["relu", "tanh", "elu", "gelu"] = Field(
        "tanh", description="activation function between the layers"
    )
    draft_chance: Chance | None = Field(
        None,
        description="chance with which a fresh policy goes on drafting, where it decides after every level or token; by "
        "default all actions are as likely, so that among many ends of a cycle hardly anything is drafted",
    )
    reward_floor: float | None = Field(
        None, description="least reward of a step in training; rarer and lower ones hide what the others teach"
    )
    num_envs: Count = Field(1, description="environments that `learn` gets at once (`ReplayVecEnv`)")

    def of_algorithm(self) -> dict[str, Any]:
        """Return the arguments that were given for the algorithm's own constructor."""
        given = self.model_fields_set - set(SB3Settings.model_fields)
        return {name: value for name, value in self if name in given}


@functools.cache
def settings_of(algorithm: type[BaseAlgorithm]) -> type[SB3Settings]:
    """Return the hyper-parameters of an algorithm, its own taken from its constructor and documentation."""
    hints, meanings = get_type_hints(algorithm.__init__, localns={"VecEnv": Any}), meanings_of(algorithm)
    own: dict[str, Any] = {
        name: (
            checked(name, hints[name], parameter.default),
            Field(parameter.default, description=meanings.get(name, "argument of the algorithm")),
        )
        for name, parameter in inspect.signature(algorithm).parameters.items()
        if name not in RESERVED
    }
    return create_model(f"{algorithm.__name__}Settings", __base__=SB3Settings, **own)


def meanings_of(algorithm: type[BaseAlgorithm]) -> dict[str, str]:
    """Return what the documentation of an algorithm and its base classes writes about each argument."""
    found: dict[str, str] = {}
    for kind in algorithm.__mro__:
        text = inspect.cleandoc(kind.__doc__ or "")
        for name, meaning in re.findall(r"^(?::param |    )(\w+): (.+?)(?=\n\n|\n:|\n    \w+: |\Z)", text, re.M | re.S):
            found.setdefault(name, " ".join(meaning.split()).rstrip("."))
    return found


def checked(name: str, hint: Any, default: Any) -> Any:
    """Return the type of an argument with its range."""
    if default == math.inf:
        return Annotated[hint, Field(title="a number of 0 or more", ge=0, allow_inf_nan=True)]
    if name in RANGES:
        return RANGES[name] | None if NoneType in get_args(hint) else RANGES[name]
    if hint in (int, float):
        return Annotated[hint, Ge(0)]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(checked("", kind, None) for kind in get_args(hint))]  # noqa: UP007
    return hint
