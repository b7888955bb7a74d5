"""Experiments as data: one YAML file per environment id, checked before anything runs."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spec_envs import ENVIRONMENTS
from spec_envs.agents import AGENTS
from spec_envs.controls import CONTROLS
from spec_envs.experiments.hyperparameters import check_name, check_value
from spec_envs.settings import Settings, check_keywords, keyword_types
from spec_envs.yaml_text import Loader, parse_yaml

FOLDER = Path(__file__).parent


class Stage(BaseModel):
    """One of several trainings in turn. With ``partner: false`` the other decision is fixed."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    env: dict[str, Any] = {}
    total_timesteps: int | None = Field(default=None, ge=1)
    partner: bool = True


class Experiment(BaseModel):
    """A stanza: an agent, its environment, and its training.

    Attributes:
        agent: a name of ``agents.AGENTS``; by default the stanza's own.
        env: keyword arguments of the environment, over those of the file.
        eval_env: what is otherwise in the final table, over ``env``; ``{trace: null}`` evaluates on the models what was
            trained on a trace.
        total_timesteps: environment steps of training.
        hyperparameters: keyword arguments of the agent.
        eval_freq: steps between validations (0: none), each at the end of a rollout; the best agent is kept.
        eval_prompts: prompts of a validation.
        test_prompts: prompts of the final table.
        checkpoint_freq: steps between checkpoints, each at the end of a rollout.
        own_text: user turns that the target writes when the run begins, and that are streamed in the place of
            ``env.prompts`` (``SpecDVI-v0``); 0 takes the prompts.
        record: how many texts of train, validation and test are recorded when the run begins, into ``traces/`` of the
            root, to train on, unless ``env.trace`` names one that is there; the final table is live.
        calibrate: measure this machine's cost table when the run begins and price training with it (evaluation is
            always timed live): a busy moment then misleads nobody. Only where the environment's clock is the wall.
        partner: run folder of a trained policy for the decisions this environment holds fixed.
        init: run folder whose policy weights training starts from.
        checkpoint: checkpoint.pt's folder to continue from.
        stages: policies trained in turn, each with the one before as partner.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    agent: str
    env: dict[str, Any] = {}
    eval_env: dict[str, Any] = {}
    total_timesteps: int = Field(default=1, ge=1)
    hyperparameters: dict[str, Any] = {}
    eval_freq: int = Field(default=0, ge=0)
    eval_prompts: int = Field(default=10, ge=1)
    test_prompts: int = Field(default=15, ge=2)
    checkpoint_freq: int = Field(default=2048, ge=1)
    own_text: int = Field(default=0, ge=0)
    record: list[int] = []
    calibrate: bool = True
    partner: str | None = None
    init: str | None = None
    checkpoint: str | None = None
    stages: list[Stage] = []


def load_experiment(env_id: str, stanza: str, overrides: Sequence[str] = ()) -> Experiment:
    """Return a stanza of ``experiments/{env_id}.yml`` with ``key=value`` overrides.

    Args:
        overrides: ``"total_timesteps=1000"``, ``"env.max_new_tokens=64"``, …; values are YAML.

    Raises:
        ValueError: an unknown id, stanza or key, or a value of the wrong type; the sentence names file and line.
    """
    path = file_of(env_id)
    text, shared, stanzas = read(path)
    if stanza not in stanzas:
        raise ValueError(f"{path.name} has no stanza {stanza!r}{nearest(stanza, stanzas)}; it has {', '.join(stanzas)}")
    chosen = dict(stanzas[stanza])
    chosen["env"] = {**shared, **chosen.get("env", {})}
    overridden = [apply(override, chosen) for override in overrides]
    chosen.setdefault("agent", stanza)

    def place(where: tuple[str, ...]) -> str:
        """Return where a key was set: "SET", or a line of the file."""
        if any(where[: len(key)] == key for key in overridden):
            return "SET"
        return f"{path.name}:{line_of(text, ('agents', stanza, *where), ('env', *where[1:]))}"

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
    return experiment


def file_of(env_id: str) -> Path:
    """Return the path of an environment's YAML file."""
    if env_id not in ENVIRONMENTS:
        raise ValueError(
            f"no environment {env_id!r}{nearest(env_id, ENVIRONMENTS)}; there are {', '.join(ENVIRONMENTS)}"
        )
    return FOLDER / f"{env_id}.yml"


def first_stanza(env_id: str) -> str:
    """Return the name of the stanza that an environment's file begins with, which is trained where none is named."""
    return next(iter(read(file_of(env_id))[2]))


def stanzas_of(env_id: str) -> list[str]:
    """Return the names of the stanzas of an environment's file, in their order."""
    return list(read(file_of(env_id))[2])


def check(experiment: Experiment, env_id: str, place: Callable[[tuple[str, ...]], str]) -> None:
    """Refuse unknown agents, environments and hyper-parameters, keywords that an environment does not take, and numbers
    that YAML reads as text."""
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
        experiment.eval_env.setdefault("trace", None)  # what was learned from a trace is evaluated live
        if not CONTROLS[env_id].trace_kind:
            raise ValueError(f"{place(('record',))}: {env_id} has no exact traces; leave record out")
        if len(experiment.record) != 3 or min(experiment.record) < 0 or not experiment.record[0]:
            raise ValueError(
                f"{place(('record',))}: record is {experiment.record}; expected texts of train, validation and test, "
                "such as [60, 12, 30]"
            )
    for stage in experiment.stages:
        if stage.id not in ENVIRONMENTS:
            raise ValueError(f"{place(('stages',))}: no environment {stage.id!r}{nearest(stage.id, ENVIRONMENTS)}")
        known = keyword_types(CONTROLS[stage.id])
        shared = {name: value for name, value in experiment.env.items() if name in known}
        check_env(stage.env, stage.id, lambda key: place(("stages",)), shared)
    for key, value in experiment.hyperparameters.items():
        where = place(("hyperparameters", key))
        try:
            check_name(experiment.agent, key, nearest)
            refuse_unfit_numbers(key, value, where)
            check_value(experiment.agent, key, value)
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def check_env(
    env: dict[str, Any], env_id: str, place: Callable[[str], str], beneath: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Refuse keywords that an environment does not have, and values that it does not take.

    Args:
        place: returns where a keyword was set.
        beneath: keywords that hold where ``env`` sets nothing else.

    Raises:
        ValueError: the message names the place.
    """
    for key, value in env.items():
        refuse_unfit_numbers(key, value, place(key))
        try:
            check_keywords(CONTROLS[env_id], {key: value})
        except TypeError as error:
            raise ValueError(f"{place(key)}: {error}") from None
    try:
        Settings.read(CONTROLS[env_id], {**beneath, **env})
    except ValueError as error:
        key = str(error).replace("=", " ").split()[0]  # every sentence begins with the keyword
        raise ValueError(f"{place(key)}: {error}") from None


def refuse_unfit_numbers(key: str, value: Any, place: str) -> None:
    """Refuse what YAML reads as text though a number was meant, and what is no finite number, also within lists.

    Raises:
        ValueError: the sentence begins with ``place``.
    """
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            refuse_unfit_numbers(key, item, place)
    if isinstance(value, str) and is_number(value) and math.isfinite(float(value)):
        raise ValueError(
            f"{place}: {key} is the text {value!r}, not a number; "
            f"YAML wants a point and a sign in exponents: write {float(value)!r}"
        )
    if isinstance(value, str | float) and is_number(value) and not math.isfinite(float(value)):
        raise ValueError(f"{place}: {key} is {value!r}; expected a finite number")


def is_number(text: str | float) -> bool:
    """Return whether a text reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def apply(override: str, config: dict[str, Any]) -> tuple[str, ...]:
    """Set ``a.b=value`` in nested dictionaries; return the keys."""
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


def read(path: Path) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the text of a file of experiments, the keyword arguments that all its stanzas share, and the stanzas.

    Raises:
        ValueError: it is not of that form; the sentence names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = parse_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}); expected YAML in UTF-8") from None
    except ValueError as error:
        found = re.match(r"line (\d+): ", str(error))
        place, reason = (f":{found[1]}", str(error)[found.end() :]) if found else ("", str(error))
        raise ValueError(f"{path.name}{place} is not YAML as it is used here: {reason}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("agents"), dict) or not raw["agents"]:
        raise ValueError(f"{path} has no agents; expected env: and agents: at its top")
    if unknown := sorted(set(raw) - {"env", "agents"}, key=str):
        line = f"{path.name}:{line_of(text, (str(unknown[0]),))}"
        raise ValueError(f"{line}: unknown key {unknown[0]!r}; expected env and agents")
    parts: dict[tuple[str, ...], Any] = {("env",): raw.get("env"), ("agents",): raw["agents"]}
    for name, stanza in raw["agents"].items():
        parts["agents", str(name)] = stanza
        if isinstance(stanza, dict):
            parts["agents", str(name), "env"] = stanza.get("env")
    for keys, part in parts.items():
        where = f"{path.name}:{line_of(text, keys)}: {'.'.join(keys)}"
        if part is not None and not isinstance(part, dict):
            raise ValueError(f"{where} is {part!r}; expected keys and values")
        if strange := [key for key in part or {} if not isinstance(key, str)]:
            raise ValueError(f"{where} has the key {strange[0]!r}, which is not text; put it in quotes")
    stanzas = {name: {**(stanza or {})} for name, stanza in raw["agents"].items()}
    for stanza in stanzas.values():
        stanza["env"] = stanza.get("env") or {}
    return text, raw.get("env") or {}, stanzas


@functools.lru_cache(8)
def composed(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text, which know their lines."""
    return yaml.compose(text, Loader)


def line_of(text: str, *keys: tuple[str, ...]) -> int:
    """Return the line of whichever of several nested keys a YAML text holds; otherwise that of the deepest parent it
    holds."""
    best = (False, 0, 1)
    for path in keys:
        node, line, depth = composed(text), 1, 0
        for key in path:
            if not isinstance(node, yaml.MappingNode):
                break
            pair = next(((k, v) for k, v in node.value if k.value == key), None)
            if pair is None:
                break
            line, node, depth = pair[0].start_mark.line + 1, pair[1], depth + 1
        best = max(best, (depth == len(path), depth, line))
    return best[2]


def nearest(word: str, known: Any) -> str:
    """Return " (did you mean …?)" with the known word that is nearest; nothing where none is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
