"""The keyword arguments that environments of every problem share: their meanings, defaults and checks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from spec_envs.checked import check_number, choice, in_words, nearest
from spec_envs.controls.base import Control, environment_id
from spec_envs.controls.rewards import RATES
from spec_envs.decoding.loading import DEFAULT_TARGET
from spec_envs.prompts.rows import SPLITS

Keywords = dict[str, Any]
"""Keyword arguments of an environment, by name."""
EPISODES = ("prompt", "cycle")
RENDER_MODES = ("ansi", "human", "rgb_array")


class Settings(BaseModel):
    """The shared keyword arguments of an environment, made and checked by ``Settings.read``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    target: str = Field(
        DEFAULT_TARGET, description="model to decode: a name of models.yml, a hub id, a folder, or a GGUF file"
    )
    drafter: str = Field(
        "auto",
        description="EAGLE-3 head or, for chains, draft model: a name of models.yml, a folder, hub id or GGUF file; "
        '"NAME@N" is a draft model with a shortlist of N tokens, "NAME@all" one without, "lookup" is prompt lookup, "suffix" is suffix decoding, "lookup+NAME" and "suffix+NAME" try one '
        'before a head, a draft model or an exit, "suffix@stream" also drafts from earlier answers, "exit:N" is an untrained early exit of the target after N layers, and the run folder of a trained exit is that exit; '
        'several names joined by commas are drafters that SpecDrafter-v0 chooses between; "auto" is the target\'s own drafter in models.yml',
    )
    device: str = Field("auto", description='"auto", or as in torch: "cpu", "cuda"')
    dtype: str = Field(
        "auto",
        description='"auto", "int8", "q4" (blocks of a GGUF file as they are stored), or as in torch: "bfloat16", '
        '"float16", "float32"',
    )
    prompts: str = Field("all", description='prompt sets, separated by commas, or "all"')
    data_dir: str | None = Field(
        None, description="folder with {name}/question.jsonl files instead of the shipped prompts"
    )
    switch_every: int = Field(
        0, description="number of texts after which another prompt set has its turn; 0 draws every text from all sets"
    )
    split: str = Field("train", description='"train", "validation", "test" or "all"')
    template: str | None = Field(
        None, description='Jinja chat template for a model without one; "none" takes prompts as they are'
    )
    date: str | None = Field(
        None,
        description="day that templates write, YYYY-MM-DD; by default a fixed one "
        "(spec_envs.prompts.templates.DATE), or the one that a trace was recorded with",
    )
    max_new_tokens: int | None = Field(
        None,
        description="most tokens of a text, the first one included; by default 128, or fewer if a trace was recorded "
        "with fewer",
    )
    temperature: float | None = Field(
        None, description="sampling temperature of the target; 0 is greedy, None is the problem's own default"
    )
    top_p: float = Field(
        1.0, description="probability mass of the target's distribution that is sampled from, most probable first"
    )
    trace: str | None = Field(
        None,
        description="recording that is replayed instead of running models: the folder of a trace that `spec-envs "
        "trace` recorded (trees, chains, or those of several drafters, exact); a synthetic profile (chains; a name of data/profiles, or a JSON file); or "
        "an expected-acceptance trace (over a link, approximate; a name of data/traces, or an npz file)",
    )
    clock: str | Sequence[str] = Field(
        "wall",
        description='"wall" measures; the name or path of a cost table prices forwards instead, which makes the '
        "environment deterministic; of several tables one is drawn per text; a trace has its own table",
    )
    episode: str = Field(
        "prompt",
        description='length of an episode: "prompt" is a whole text, "cycle" a cycle (resets continue the text)',
    )
    reward: str | None = Field(
        None,
        description='"saved"; "ltd" for trees and chains, "rl_adapter" over a link, "accepted" at an exit; None is the '
        "problem's default",
    )
    pace: float | None = Field(
        None,
        description='tokens per second that a second costs under "saved"; by default the speed of the pair\'s best '
        "static setting: plain speed under this clock, times static_over_plain of models.yml (1 for other pairs)",
    )
    observation: str = Field(
        "default",
        description='"default"; "ltd" for trees, "counters" for chains, "rl_adapter" over a link, "policy" at an exit',
    )
    cost_features: bool = Field(False, description="append the clock's cost table to the observation")
    policy_seconds: float = Field(
        0.0, description="seconds charged for every decision (an experiment sets the agent's measured time)"
    )
    render_mode: str | None = Field(None, description='None, "ansi", "human" or "rgb_array"')

    @classmethod
    def read(cls, kind: type[Control], given: Mapping[str, Any]) -> Settings:
        """Return the shared settings among the keyword arguments of an environment of a control.

        Args:
            given: shared keyword arguments and those of the control; all names and types are checked.

        Raises:
            TypeError: an unknown name (the nearest one is named), or a value of the wrong type.
            ValueError: a value out of its range, or two that do not go together.
        """
        check_keywords(kind, given)
        settings = cls.shared(given)
        settings._check(list(kind.rewards))
        return settings

    @classmethod
    def shared(cls, given: Mapping[str, Any]) -> Settings:
        """Return the shared settings among keyword arguments that ``read`` has accepted before; the others are
        ignored."""
        return cls(**{name: plain(value) for name, value in given.items() if name in cls.model_fields})

    def _check(self, rewards: Sequence[str]) -> None:
        """Refuse values that no environment allows, and rewards that the problem does not offer."""
        choice("render_mode", self.render_mode, (None, *RENDER_MODES))
        choice("episode", self.episode, EPISODES)
        choice("split", self.split, (*SPLITS, "all"))
        if self.reward is not None:
            choice("reward", self.reward, rewards)
        if self.reward in RATES and self.episode == "prompt":
            raise ValueError(
                f'reward="{self.reward}" needs episode="cycle": summed over a prompt, tokens / seconds would pay for '
                "many cheap cycles instead of fast text"
            )
        for name, fits, expected in (
            ("max_new_tokens", lambda tokens: tokens >= 2, "2 or more (the first one is the prefill's)"),
            ("pace", lambda pace: 0 <= pace <= 1e9, "tokens per second, 0 or more"),
            ("policy_seconds", lambda seconds: 0 <= seconds <= 1e9, "seconds per decision, 0 or more"),
            ("switch_every", lambda texts: texts >= 0, "texts, or 0 for none"),
        ):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, fits, expected)


def keyword_types(kind: type[Control]) -> dict[str, Any]:
    """Return the types of all keyword arguments that an environment of a control has, by name."""
    shared = {name: field.annotation for name, field in Settings.model_fields.items()}
    own = get_type_hints(kind.__init__)
    return shared | {name: hint for name, hint in own.items() if name != "return"}


def check_keywords(kind: type[Control], given: Mapping[str, Any]) -> None:
    """Refuse keyword arguments by name and type.

    Raises:
        TypeError: neither ``Settings`` nor the control has a name (the nearest one is named), or a value is of the
            wrong type.
    """
    types = keyword_types(kind)
    for name, value in given.items():
        if name not in types:
            hint = nearest(name, types) or f"; expected one of {', '.join(types)}"
            # TorchRL looks for Python's own words to find out that it may not pass frameskip
            raise TypeError(f"{environment_id(kind)} got an unexpected keyword argument {name!r}{hint}")
        try:
            TypeAdapter(types[name]).validate_python(plain(value), strict=True)
        except ValidationError:
            raise TypeError(f"{name} is {value!r}; expected {in_words(types[name])}") from None


def plain(value: Any) -> Any:
    """Return a number of NumPy as one of Python, and any other value as it is."""
    return value.item() if isinstance(value, np.generic) else value


def signature(kind: type[Control]) -> inspect.Signature:
    """Return every keyword argument of an environment of a control with its default, the control's own first."""
    own = {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in Settings.model_fields
    }
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.annotation)
        for name, field in Settings.model_fields.items()
    ]
    return inspect.Signature([*own.values(), *shared])


def documentation() -> str:
    """Return a list in Markdown of the shared keyword arguments, their defaults and what they mean."""
    rows = [f"- `{name}={field.default!r}`: {field.description}." for name, field in Settings.model_fields.items()]
    return "\n".join(rows)
