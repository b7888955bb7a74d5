from __future__ import annotations

from pathlib import Path

import pytest

from spec_envs import ENVIRONMENTS
from spec_envs.agents import AGENTS
from spec_envs.controls import make_control
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.runs import resolved
from spec_envs.experiments.stanzas import ExperimentFile

STANZAS = [(env_id, stanza) for env_id in ENVIRONMENTS for stanza in ExperimentFile.of(env_id).stanzas]


@pytest.mark.parametrize(("env_id", "stanza"), STANZAS)
def test_every_stanza_builds_its_agent(env_id: str, stanza: str) -> None:
    experiment = load_experiment(env_id, stanza)
    control = make_control(env_id, experiment.env)
    settings = resolved(experiment, env_id, stanza, seed=0)
    AGENTS[experiment.agent](control=control, **settings.hyperparameters)


def test_default_gamma() -> None:
    for env_id in ENVIRONMENTS:  # at an exit a draft is rewarded when it is verified and has no later effect
        expected = 0.0 if env_id == "SpecDVI-v0" else 1.0
        assert load_experiment(env_id, "ppo").hyperparameters["gamma"] == expected


def test_ltd_stanzas_have_published_settings() -> None:
    ltd = load_experiment("SpecDepth-v0", "ltd")
    expected = {"learning_rate": 3e-4, "n_steps": 128, "batch_size": 64, "n_epochs": 1, "gamma": 0.99, "ent_coef": 0.0}
    assert ltd.total_timesteps == 100_000 and expected.items() <= ltd.hyperparameters.items()
    assert ltd.hyperparameters["pi_arch"] == [512, 256] and ltd.hyperparameters["vf_arch"] == [1024, 512]
    paper = load_experiment("SpecBudget-v0", "ltd-paper")
    expected = {"learning_rate": 1e-3, "n_steps": 2048, "batch_size": 256, "n_epochs": 20, "ent_coef": 0.01}
    assert expected.items() <= paper.hyperparameters.items() and paper.hyperparameters["gamma"] == 0.9
    iterative, on_all = (load_experiment("SpecDepth-v0", name) for name in ("ltd-iterative", "ltd-iterative-all"))
    for experiment, prompts in ((iterative, "humaneval"), (on_all, "all")):
        assert experiment.env == ltd.env | {"prompts": prompts} and experiment.record
        assert experiment.hyperparameters == ltd.hyperparameters and experiment.total_timesteps == 100_000
        assert experiment.eval_freq and experiment.stages == iterative.stages
    assert [s.id[4] for s in iterative.stages] == ["B", "D", "B", "D", "B"]
    assert [s.partner for s in iterative.stages] == [False, False, True, True, True]
    assert all(s.env["budgets"] == "ltd" for s in iterative.stages if s.id == "SpecBudget-v0")


def test_overrides_change_settings() -> None:
    changed = load_experiment(
        "SpecDepth-v0", "ppo", ["total_timesteps=64", "env.max_new_tokens=32", "hyperparameters.pi_arch=[8, 4]"]
    )
    assert changed.total_timesteps == 64 and changed.env["max_new_tokens"] == 32
    assert changed.hyperparameters["pi_arch"] == [8, 4] and changed.hyperparameters["gamma"] == 1.0
    assert load_experiment("SpecDepth-v0", "ppo", ["hyperparameters.gamma=5e-1"]).hyperparameters["gamma"] == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("total_timestep=64", "SET: total_timestep: unknown key .did you mean 'total_timesteps'"),
        ("total_timesteps=many", "SET: total_timesteps: Input should be a valid integer"),
        ("env.max_depht=3", "SET: SpecDepth-v0 got an unexpected keyword argument 'max_depht'"),
        ("hyperparameters.n_step=3", "SET: unknown hyper-parameter 'n_step' of ppo"),
        ("hyperparameters.pi_arch=[64,", "is not YAML; write lists without spaces"),
    ],
)
def test_invalid_overrides_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_experiment("SpecDepth-v0", "ppo", [override])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "SpecDepth-v0.yml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "agents:\n  ppo:\n    total_timestep: 5\n",
            r"SpecDepth-v0.yml:3: total_timestep: .* \(did you mean 'total_timesteps'",
        ),
        (
            "agents:\n  ppo:\n    total_timesteps: '5'\n",
            r"SpecDepth-v0.yml:3: total_timesteps: Input should be a valid integer",
        ),
        (
            "agents:\n  ppo:\n    hyperparameters:\n      gamma: 1.0\n      learning_rate: 3e-4\n",
            r"SpecDepth-v0.yml:5: learning_rate is the text '3e-4', not a number; .*write 0.0003",
        ),
        (
            "env:\n  max_depht: 3\nagents:\n  ppo: {}\n",
            r"SpecDepth-v0.yml:2: SpecDepth-v0 got an unexpected keyword argument 'max_depht' \(did you mean 'max_depth'",
        ),
        (
            "agents:\n  ppo:\n    hyperparameters:\n      n_stepss: 32\n",
            r"SpecDepth-v0.yml:4: unknown hyper-parameter 'n_stepss' of ppo \(did you mean 'n_steps'",
        ),
        (
            "agents:\n  ppo:\n    agent: fixed\n    hyperparameters:\n      depth: 3\n",
            r"SpecDepth-v0.yml:5: unknown hyper-parameter 'depth' of fixed; there are value",
        ),
        (
            "agents:\n  ppo:\n    hyperparameters:\n      pi_arch: [3e2]\n",
            r"SpecDepth-v0.yml:4: pi_arch is the text '3e2', not a number",
        ),
        (
            "env:\n  max_new_tokens: many\nagents:\n  ppo: {}\n",
            r"SpecDepth-v0.yml:2: max_new_tokens is 'many'; expected a whole number or null",
        ),
        (
            "agents:\n  ppo:\n    stages:\n      - {id: SpecBudget-v0, env: {max_depth: 1e1}}\n",
            r"SpecDepth-v0.yml:3: max_depth is the text '1e1', not a number",
        ),
        ("agents:\n  ppo:\n    agent: pppo\n", r"SpecDepth-v0.yml:3: no agent 'pppo' \(did you mean 'ppo'"),
        ("agents:\n  ppo: {}\nagent: x\n", r"SpecDepth-v0.yml:3: unknown key 'agent'; expected env and agents"),
        ("agents: [\n", r"is not YAML"),
        ("env: {}\n", r"has no agents"),
    ],
)
def test_errors_name_file_and_line(text: str, message: str, written: Path) -> None:
    written.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_experiment("SpecDepth-v0", "ppo", file=written)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no environment 'SpecDept-v0' \(did you mean 'SpecDepth-v0'"):
        load_experiment("SpecDept-v0", "ppo")
    with pytest.raises(ValueError, match=r"has no stanza 'ppoo' \(did you mean 'ppo'"):
        load_experiment("SpecDepth-v0", "ppoo")
    with pytest.raises(ValueError, match="override 'gamma' is not key=value"):
        load_experiment("SpecDepth-v0", "ppo", ["gamma"])


@pytest.mark.parametrize(
    ("env_id", "stanza", "value", "match"),
    [
        ("SpecDepth-v0", "hindsight", "[60,12]", "expected texts of train, validation and test"),
        ("SpecDepth-v0", "hindsight", "[0,1,1]", "expected texts of train, validation and test"),
        ("SpecDVI-v0", "random", "[4,1,1]", "has no exact traces"),
        ("SpecDepth-v0", "ltd-iterative", "[40,0,8]", "without texts to validate on every 10000 steps"),
    ],
)
def test_invalid_record_setting_is_refused(env_id: str, stanza: str, value: str, match: str) -> None:
    with pytest.raises(ValueError, match=f"SET: .*{match}"):
        load_experiment(env_id, stanza, [f"record={value}"])


def test_unknown_hyperparameter_of_a_stage_is_refused() -> None:
    stages = "stages=[{id: SpecDepth-v0, hyperparameters: {target_k: 0.02}}]"
    with pytest.raises(ValueError, match=r"SET: unknown hyper-parameter 'target_k' of ppo \(did you mean 'target_kl'"):
        load_experiment("SpecDepth-v0", "ltd-iterative", [stages])


def test_agents_trained_on_traces_are_evaluated_live() -> None:
    assert load_experiment("SpecK-v0", "hindsight", ["env.trace=some/trace"]).eval_env == {"trace": None}
    assert load_experiment("SpecK-v0", "ppo-live", ["env.trace=some/trace"]).eval_env == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "agents:\n  ppo: {}\n  a2c: {}\n  ppo: {}\n",
            r"SpecDepth-v0.yml:4 is not YAML as it is used here: the key 'ppo'",
        ),
        (
            "agents:\n  ppo:\n    seed: 1\n    seed: 2\n",
            r"SpecDepth-v0.yml:4 .*the key 'seed' stands twice, first in line 3",
        ),
        ("agents:\n\tppo: {}\n", r"SpecDepth-v0.yml:2 .*found character '\\t'"),
        ("agents: {ppo: 5}\n", r"SpecDepth-v0.yml:1: agents.ppo is 5; expected keys and values"),
        ("env: 3\nagents: {ppo: {}}\n", r"SpecDepth-v0.yml:1: env is 3; expected keys and values"),
        ("agents:\n  1: {}\n", r"agents has the key 1, which is not text"),
        ("agents:\n  ppo: {env: [1]}\n", r"agents.ppo.env is \[1\]; expected keys and values"),
        ("agents:\n  ppo: {hyperparameters: {gamma: .nan}}\n", r":2: gamma is nan; expected a finite number"),
        ("agents:\n  ppo: {env: {pace: .inf}}\n", r":2: pace is inf; expected a finite number"),
        ("agents:\n  ppo: {calibrate: off}\n", r":2: calibrate: Input should be a valid boolean"),
        ("agents:\n  ppo: {hyperparameters: {gamma: abc}}\n", r":2: gamma is 'abc'; expected a number from 0 to 1"),
        ("agents:\n  ppo: {hyperparameters: {gamma: 1.5}}\n", r":2: gamma is 1.5; expected a number from 0 to 1"),
        (
            "agents:\n  ppo: {hyperparameters: {n_steps: 2.5}}\n",
            r":2: n_steps is 2.5; expected a whole number of 1 or more",
        ),
        (
            "agents:\n  ppo: {hyperparameters: {batch_size: -8}}\n",
            r":2: batch_size is -8; expected a whole number of 1 or more",
        ),
        (
            "agents:\n  ppo: {hyperparameters: {pi_arch: [8, x]}}\n",
            r":2: pi_arch is \[8, 'x'\]; expected the sizes of hidden layers",
        ),
        ("agents: {}\n", r"has no agents"),
        ("", r"has no agents"),
    ],
)
def test_invalid_files_are_refused(text: str, message: str, written: Path) -> None:
    written.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_experiment("SpecDepth-v0", "ppo", file=written)
    assert "\n" not in str(error.value)


def test_file_not_in_utf_8_is_refused(written: Path) -> None:
    written.write_bytes("agents: {ppo: {}} # Grüße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot read .*SpecDepth-v0.yml \(.*\); expected YAML in UTF-8"):
        load_experiment("SpecDepth-v0", "ppo", file=written)


@pytest.mark.parametrize(
    "override",
    [
        "hyperparameters.gamma=nan",
        "env.pace=inf",
        "hyperparameters.n_steps={a: 1, a: 2}",
        "env=5",
        "env.max_depth=[[[[",
    ],
)
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match=r"SET: |override ") as error:
        load_experiment("SpecDepth-v0", "ppo", [override])
    assert "\n" not in str(error.value)
