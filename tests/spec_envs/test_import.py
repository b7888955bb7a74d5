"""Importing the package loads no models, and its public names are found at the top."""

from __future__ import annotations

import inspect
import json
import pickle
import pydoc
import subprocess
import sys

import gymnasium as gym
import pytest

import spec_envs
from spec_envs import ENVIRONMENTS, environments
from spec_envs.controls import CONTROLS
from spec_envs.env import SpecEnv
from spec_envs.settings import Settings

HEAVY = {"torch", "transformers", "scipy", "matplotlib", "pydantic", "stable_baselines3"}


def test_import_loads_no_heavy_modules() -> None:
    """Neither does listing the registered environments or the package's names."""
    script = (
        "import json, sys, spec_envs, gymnasium; dir(spec_envs); "
        "specs = [gymnasium.spec(env_id) for env_id in spec_envs.ENVIRONMENTS]; "
        "print(json.dumps([sorted(sys.modules), len(specs)]))"
    )
    modules, specs = json.loads(subprocess.check_output([sys.executable, "-c", script], text=True))
    assert specs == 7 and not HEAVY & set(modules)
    own = {name for name in modules if name.startswith("spec_envs")}
    assert own == {"spec_envs", "spec_envs.version"}


@pytest.mark.parametrize("name", ["generate", "Generation", "load_decoder", "load_tokenizer", "agents"])
def test_public_names_are_found_in_a_new_process(name: str) -> None:
    """Names are found whatever was imported before, because no module has the name of a function."""
    script = (
        f"import spec_envs; first = spec_envs.{name}; import spec_envs.generation, spec_envs.environments; "
        f"from spec_envs import {name}; assert first is {name}; assert '{name}' in dir(spec_envs)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_unknown_names_raise_errors() -> None:
    with pytest.raises(AttributeError, match="module 'spec_envs' has no attribute 'genrate'"):
        _ = spec_envs.genrate
    with pytest.raises(AttributeError, match="has no class 'SpecNoneEnv'; register its environment first"):
        _ = environments.SpecNoneEnv
    with pytest.raises(KeyError, match="there is no control 'none'; there are depth, budget"):
        CONTROLS["none"]


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_environment_class_shows_documentation(env_id: str) -> None:
    kind = getattr(environments, spec_envs.class_name(env_id))
    assert issubclass(kind, SpecEnv) and pickle.loads(pickle.dumps(kind)) is kind
    text = pydoc.plain(pydoc.render_doc(kind))
    assert "| Num | Observation" in text and "## Shared Arguments" in text and "As in Spec" not in text
    assert all(f'`"{reward}"`: ' in text for reward in CONTROLS[env_id].rewards)
    for name, field in Settings.model_fields.items():
        assert field.description and f"`{name}={field.default!r}`: {field.description}" in text
    own = {name: parameter.default for name, parameter in inspect.signature(CONTROLS[env_id]).parameters.items()}
    shared = {name: field.default for name, field in Settings.model_fields.items()}
    shown = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    assert shown == own | shared


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_spec_has_vector_entry_point_if_traces_replay_it(env_id: str) -> None:
    assert bool(gym.spec(env_id).vector_entry_point) == bool(CONTROLS[env_id].trace_kind)
    assert CONTROLS[env_id] is CONTROLS[CONTROLS[env_id].name] is CONTROLS[ENVIRONMENTS[env_id]]


def test_registered_problem_gets_its_own_class() -> None:
    try:
        spec_envs.register("elsewhere/Other-v1", "spec_envs.controls.k:KControl")
        env = gym.make("elsewhere/Other-v1", trace="qwen2.5-coder-32b-cpu", max_new_tokens=20)
        assert type(env.unwrapped).__name__ == "elsewhereOtherv1Env"
        pickle.loads(pickle.dumps(env)).reset(seed=0)
    finally:
        del ENVIRONMENTS["elsewhere/Other-v1"], gym.registry["elsewhere/Other-v1"]
