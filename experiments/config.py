"""Experiments as data: one YAML file per environment id, checked before anything runs."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spec_envs import ENVIRONMENTS
from spec_envs.agents import AGENTS
from spec_envs.agents.yaml_text import parse_yaml
from spec_envs.checked import nearest
from spec_envs.controls import CONTROLS
from spec_envs.experiments.hyperparameters import check_hyperparameters
from spec_envs.experiments.stanzas import ExperimentFile
from spec_envs.settings import Keywords, Settings, check_keywords, keyword_types


class Stage(BaseModel):
    """One of the trainings of a stanza that trains several policies in turn. With ``partner: false`` the decision of
    the other policy stays fixed."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str = Field(description="environment that is trained on")
    env: Keywords = Field({}, description="keyword arguments of the environment, in addition to those of the stanza")
    total_timesteps: int | None = Field(None, ge=1, description="environment steps; null takes those of the stanza")
    hyperparameters: dict[str, Any] = Field({}, description="hyper-parameters in addition to those of the stanza")
    partner: bool = Field(
        True, description="the newest policy of the other problem decides with this one; false keeps its decision fixed"
    )


class Experiment(BaseModel):
    """A stanza: an agent, its environment, and its training. ``train --help`` lists the keys."""

    model_config = ConfigDict(extra="forbid", strict=True)
    agent: str = Field(description="name of the agent; by default the name of the stanza")
    env: Keywords = Field({}, description="keyword arguments of the environment, in addition to those of the file")
    eval_env: Keywords = Field(
        {},
        description="keyword arguments that override env in the final table; {trace: null} evaluates on live models "
        "what was trained on a trace",
    )
    total_timesteps: int = Field(1, ge=1, description="environment steps of training")
    hyperparameters: dict[str, Any] = Field({}, description="hyper-parameters of the agent, by name")
    eval_freq: int = Field(
        0,
        ge=0,
        description="environment steps between validations, the best of which is kept; 0 validates never. A validation "
        "waits for the end of a rollout",
    )
    eval_prompts: int = Field(13, ge=1, description="prompts of a validation")
    test_prompts: int = Field(15, ge=2, description="prompts of the final table")
    checkpoint_freq: int = Field(
        2048, ge=1, description="environment steps between checkpoints; each waits for the end of a rollout"
    )
    own_text: int = Field(
        0,
        ge=0,
        description="user turns that the target writes when the run begins and that replace env.prompts "
        "(SpecDVI-v0); 0 uses env.prompts",
    )
    record: list[int] = Field(
        [],
        description="numbers of training, validation and test texts that are recorded when the run begins, to train "
        "on, unless env.trace names a trace; the final table is measured on the models",
    )
    calibrate: bool = Field(
        True,
        description="measure this machine's cost table when the run begins and price training with it, so that other "
        "load does not disturb it; only where env.clock is the wall. The final table is then timed live",
    )
    partner: str | None = Field(
        None, description="run folder of a trained policy for the decisions that this environment holds fixed"
    )
    init: str | None = Field(None, description="run folder whose weights training starts from")
    checkpoint: str | None = Field(None, description="folder of a checkpoint.pt to continue from")
    stages: list[Stage] = Field(
        [], description="policies trained in turn, each with the newest one of the other problem as its partner"
    )

    @classmethod
    def described(cls) -> str:
        """Return the keys of a stanza, one line each: its default and what it means."""
        lines = [
            "keys of a stanza, which --set overrides (KEY=VALUE; env.NAME and hyperparameters.NAME for those within):"
        ]
        for name, field in cls.model_fields.items():
            default = f" (default {json.dumps(field.default)})" if isinstance(field.default, int) else ""
            lines.append(f"  {name:<16} {field.description}{default}")
        return "\n".join(lines)


def load_experiment(env_id: str, stanza: str, overrides: Sequence[str] = (), file: Path | None = None) -> Experiment:
    """Return a stanza of an environment's YAML file, with ``key=value`` overrides.

    Args:
        overrides: ``"total_timesteps=1000"``, ``"env.max_new_tokens=64"``, …; values are YAML.
        file: a YAML file of your own; by default the shipped ``experiments/{env_id}.yml``.

    Raises:
        ValueError: an unknown id, stanza or key, or a value of the wrong type; the sentence names file and line.
    """
    source = ExperimentFile.of(env_id, file)
    if stanza not in source.stanzas:
        raise ValueError(
            f"{source.name} has no stanza {stanza!r}{nearest(stanza, source.stanzas)}; "
            f"it has {', '.join(source.stanzas)}"
        )
    chosen = dict(source.stanzas[stanza])
    chosen["env"] = {**source.env, **chosen.get("env", {})}
    overridden = [apply_override(override, chosen) for override in overrides]
    chosen.setdefault("agent", stanza)

    def place(where: tuple[str, ...]) -> str:
        """Return where a key was set: "SET", or a line of the file."""
        if any(where[: len(key)] == key for key in overridden):
            return "SET"
        return source.place(("agents", stanza, *where), ("env", *where[1:]))

    try:
        experiment = Experiment.model_validate(chosen)
    except ValidationError as error:
        first = error.errors()[0]
        where = tuple(str(part) for part in first["loc"])
        reason = first["msg"]
        if first["type"] == "extra_forbidden":
            reason = f"unknown key{nearest(where[-1], Experiment.model_fields)}"
        raise ValueError(f"{place(where)}: {'.'.join(where)}: {reason}") from None
    check(experiment, env_id, place)
    if experiment.record:
        experiment.eval_env.setdefault("trace", None)  # what was learned from a trace is evaluated live
    return experiment


def check(experiment: Experiment, env_id: str, place: Callable[[tuple[str, ...]], str]) -> None:
    """Refuse unknown names and unfit values in an experiment.

    Args:
        place: returns where nested keys were set.

    Raises:
        ValueError: the message begins with the place.
    """
    if experiment.agent not in AGENTS:
        raise ValueError(
            f"{place(('agent',))}: no agent {experiment.agent!r}{nearest(experiment.agent, AGENTS)}; "
            f"there are {', '.join(AGENTS)}"
        )
    check_env(experiment.env, env_id, lambda key: place(("env", key)))
    check_env(experiment.eval_env, env_id, lambda key: place(("eval_env", key)), experiment.env)
    for key in set(experiment.eval_env) & set(inspect.signature(CONTROLS[env_id]).parameters):
        raise ValueError(
            f"{place(('eval_env', key))}: {key} is part of the problem that the agent has learned; set it in env"
        )
    if experiment.record:
        check_record(experiment, env_id, place(("record",)))
    for stage in experiment.stages:
        check_stage(stage, experiment, place(("stages",)))
    for key, value in experiment.hyperparameters.items():
        refuse_unfit_numbers(key, value, place(("hyperparameters", key)))
    check_hyperparameters(experiment.agent, experiment.hyperparameters, place)


def check_record(experiment: Experiment, env_id: str, place: str) -> None:
    """Refuse to record what has no trace, anything but three numbers of texts, and validations without texts."""
    texts = experiment.record
    if not CONTROLS[env_id].trace_kind:
        raise ValueError(f"{place}: {env_id} has no exact traces; leave record out")
    if len(texts) != 3 or min(texts) < 0 or not texts[0]:
        raise ValueError(
            f"{place}: record is {texts}; expected texts of train, validation and test, such as [60, 12, 30]"
        )
    if experiment.eval_freq and not texts[1] and not experiment.env.get("trace"):
        raise ValueError(
            f"{place}: record is {texts}, without texts to validate on every {experiment.eval_freq} steps; record some, "
            "or set eval_freq=0"
        )


def check_stage(stage: Stage, experiment: Experiment, place: str) -> None:
    """Refuse a stage of an unknown environment, or with keywords or hyper-parameters that do not fit it."""
    if stage.id not in ENVIRONMENTS:
        raise ValueError(f"{place}: no environment {stage.id!r}{nearest(stage.id, ENVIRONMENTS)}")
    known = keyword_types(CONTROLS[stage.id])
    shared = {name: value for name, value in experiment.env.items() if name in known}
    check_env(stage.env, stage.id, lambda key: place, shared)
    check_hyperparameters(experiment.agent, stage.hyperparameters, lambda key: place)


def check_env(
    env: Keywords, env_id: str, place: Callable[[str], str], defaults: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Refuse keywords that an environment does not have, and values that it does not accept.

    Args:
        place: returns where a keyword was set.
        defaults: keywords that apply unless ``env`` overrides them.

    Raises:
        ValueError: the message begins with the place.
    """
    for key, value in env.items():
        refuse_unfit_numbers(key, value, place(key))
        try:
            check_keywords(CONTROLS[env_id], {key: value})
        except TypeError as error:
            raise ValueError(f"{place(key)}: {error}") from None
    try:
        Settings.read(CONTROLS[env_id], {**defaults, **env})
    except ValueError as error:
        key = str(error).replace("=", " ").split()[0]  # every message begins with the keyword
        raise ValueError(f"{place(key)}: {error}") from None


def refuse_unfit_numbers(key: str, value: Any, place: str) -> None:
    """Refuse text that was meant as a number (YAML reads ``3e-4`` as text), and numbers that are not finite, also
    within lists.

    Raises:
        ValueError: the message begins with ``place``.
    """
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            refuse_unfit_numbers(key, item, place)
    if isinstance(value, str) and is_number(value) and math.isfinite(float(value)):
        raise ValueError(
            f"{place}: {key} is the text {value!r}, not a number; "
            f"YAML needs a decimal point and a sign in exponents: write {float(value)!r}"
        )
    if isinstance(value, str | float) and is_number(value) and not math.isfinite(float(value)):
        raise ValueError(f"{place}: {key} is {value!r}; expected a finite number")


def is_number(text: str | float) -> bool:
    """Return True for a number, and for text that Python reads as one."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def apply_override(override: str, config: dict[str, Any]) -> tuple[str, ...]:
    """Set the key of an override ``"a.b=value"`` in nested dictionaries, and return the keys, such as ``("a", "b")``.

    Raises:
        ValueError: the override is malformed, or a value stands where keys are expected.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not key=value; for example env.max_new_tokens=64")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(
            f"override {override!r} is not YAML; write lists without spaces, as in [64,64] ({error})"
        ) from None
    *parents, last = keys = key.strip().split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            raise ValueError(f"override {override!r}: {parent} holds no keys")
    config[last] = float(value) if isinstance(value, str) and is_number(value) else value  # 3e-4 is text to YAML
    return tuple(keys)
