from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from spec_envs import agents
from spec_envs.agents import AGENTS
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.agents.sb3.agent import ALGORITHMS, SB3Agent
from spec_envs.agents.schedules import schedule
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.experiments.drafters import recording
from spec_envs.files import write_json
from spec_envs.sealed import write_torch
from tests.support.identity import Identity
from tests.support.processes import file_size_limit

SMALL: dict[str, dict[str, Any]] = {
    "ppo": {"n_steps": 32, "batch_size": 16, "n_epochs": 2},
    "a2c": {"n_steps": 8},
    "trpo": {"n_steps": 32, "batch_size": 16},
    "recurrent-ppo": {"n_steps": 32, "batch_size": 16, "n_epochs": 1},
    "dqn": {"learning_starts": 16, "buffer_size": 200, "batch_size": 8},
    "ddqn": {"learning_starts": 16, "buffer_size": 200, "batch_size": 8},
    "qrdqn": {"learning_starts": 16, "buffer_size": 200, "batch_size": 8},
}


def test_registry_lists_every_agent() -> None:
    controllers = {
        "adaptive-k",
        "hf-schedule",
        "confidence",
        "svip",
        "adaedl",
        "gammatune",
        "copy-k",
        "ucb",
        "specdec++",
    }
    controllers |= {
        "rl-adapter",
        "reinforce",
        "dvi",
        "ddd",
        "decision-tree",
        "exact-pg",
        "hindsight",
        "svip-tree",
        "expected-gain",
        "ucb-budget",
        "fixed-order",
        "hedge",
        "ucb-drafter",
    }
    assert set(AGENTS) == {"random", "fixed", *ALGORITHMS, *controllers}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("control", [DepthControl(), BudgetControl(), KControl()], ids=["depth", "budget", "k"])
def test_predict_equals_stable_baselines(name: str, control: Any) -> None:
    agent = AGENTS[name](control=control, seed=3, pi_arch=[16, 8], vf_arch=[8], activation="relu", **SMALL[name])
    rng = np.random.default_rng(0)
    mine = theirs = None
    for step in range(30):
        seen = rng.random(control.observation_space.shape).astype(np.float32)
        start = np.array([step % 10 == 0])
        action, mine = agent.predict(seen, mine, start, deterministic=True)
        expected, theirs = agent.model.predict(seen, theirs, start, deterministic=True)
        assert action == int(expected)
        assert control.action_space.contains(agent.predict(seen, mine)[0])
    assert 0 < agent.decision_seconds < 0.1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_learn_save_load_and_resume(name: str, tmp_path: Path) -> None:
    control = DepthControl()

    def fresh() -> SB3Agent:
        return AGENTS[name](control=control, seed=0, pi_arch=[8], vf_arch=[8], **SMALL[name])

    agent = fresh()
    agent.learn(64, Identity(control.observation_space, control.action_space))
    agent.save(tmp_path)
    agent.save_checkpoint(tmp_path)
    loaded, resumed = fresh(), fresh()
    loaded.load(tmp_path)
    resumed.load_checkpoint(tmp_path)
    for a, b, c in zip(*(x.model.policy.state_dict().values() for x in (agent, loaded, resumed)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    resumed.learn(128, Identity(control.observation_space, control.action_space))
    assert resumed.model.num_timesteps == 128
    if name.endswith("dqn"):
        assert resumed.model.replay_buffer.size() == 128


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "gelu"])
def test_numpy_network_equals_torch(activation: str) -> None:
    agent = AGENTS["ppo"](control=DepthControl(), seed=3, pi_arch=[16, 8], vf_arch=[8], activation=activation)
    seen = np.random.default_rng(0).normal(size=(20, *agent.model.observation_space.shape)).astype(np.float32)
    policy = agent.model.policy
    with torch.no_grad():
        expected = policy.action_net(policy.mlp_extractor.policy_net(torch.from_numpy(seen))).numpy()
    np.testing.assert_allclose([agent.network(x, None)[0] for x in seen], expected, atol=1e-5)


def test_ppo_learns_toy_problem() -> None:
    control = DepthControl()
    agent = AGENTS["ppo"](control=control, seed=0, learning_rate=3e-3, gamma=0.0, n_steps=256, n_epochs=10)
    agent.learn(6000, Identity(control.observation_space, control.action_space))
    rng = np.random.default_rng(1)
    seen = rng.random((200, *control.observation_space.shape)).astype(np.float32)
    right = [agent.predict(x, deterministic=True)[0] == int(x[0] > 0.5) for x in seen]
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("total", [1000, 100_000])
@pytest.mark.parametrize("warmup", [None, 50])
def test_adawm_schedule(total: int, warmup: int | None) -> None:
    w = warmup or total // 100
    rate = schedule("adawm", 2.0, total, warmup)
    for done in (0, 1, w // 2, w, w + 1, total // 2, total, total + 128):
        expected = 2.0 * done / w if done < w else max(0.0, 2.0 * (1 - (done - w) / (total - w)))
        assert rate(1 - done / total) == pytest.approx(expected, abs=1e-9)


def test_invalid_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="lr_schedule is 'cosine'; expected one of constant, linear, adawm"):
        AGENTS["ppo"](control=DepthControl(), lr_schedule="cosine")
    with pytest.raises(ValueError, match="warmup_timesteps is 10; expected less"):
        schedule("adawm", 1.0, 10, 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_steps": 1}, r"ppo refuses its hyper-parameters \(n_steps=1\): "),
        ({"pi_arch": 64}, r"pi_arch is 64; expected the sizes of hidden layers"),
        ({"learning_rate": "fast"}, r"learning_rate is 'fast'; expected a number"),
    ],
)
def test_invalid_hyperparameters_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AGENTS["ppo"](control=DepthControl(), **given)


def test_unknown_hyperparameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown hyper-parameter 'n_step' of PPOAgent \(did you mean 'n_steps'\?\)"):
        AGENTS["ppo"](control=DepthControl(), n_step=4)


@pytest.mark.parametrize("observation", ["default", "ltd"])
def test_fixed_agent_follows_its_setting(observation: str, tiny: dict) -> None:
    from spec_envs import generate
    from spec_envs.decoding.loading import load_decoder

    decoder = load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32")
    control = DepthControl(observation=observation)
    for value in (1, 2, 7, 12):
        done = generate(decoder, control, FixedAgent(control, value=value), [3, 4, 5], 40).run()
        assert {c.depth for c in done.cycles} == {value}
    budgets = BudgetControl(observation=observation)
    for value in budgets.settings():
        done = generate(decoder, budgets, FixedAgent(budgets, value=value), [3, 4, 5], 20).run()
        assert {c.verified for c in done.cycles} == {value}
    with pytest.raises(ValueError, match="value is 13; expected one of 1, 2"):
        FixedAgent(control, value=13)


def write_run(folder: Path, trained: Any, **config: Any) -> Path:
    """Save an agent with a config as a run folder, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    trained.save(folder)
    base = {"id": "SpecDepth-v0", "env": {}, "agent": "ppo", "hyperparameters": {}}
    (folder / "config.yml").write_text(yaml.safe_dump(base | config))
    return folder


def test_run_loads_with_partner(tmp_path: Path) -> None:
    sizes = {"budgets": "ltd", "max_depth": 6}
    budget = AGENTS["dqn"](control=BudgetControl(**sizes), seed=1)
    depth = AGENTS["ppo"](control=DepthControl(max_depth=6), seed=2, pi_arch=[8])
    partner = write_run(tmp_path / "b", budget, id="SpecBudget-v0", agent="dqn", env=sizes)
    run = write_run(
        tmp_path / "d", depth, env={"max_depth": 6}, partner=str(partner), hyperparameters={"pi_arch": [8], "seed": 0}
    )
    control, agent = agents.load(run)
    assert isinstance(control, DepthControl) and control.max_depth == 6
    assert isinstance(control.partner.control, BudgetControl) and len(control.partner.control.budgets) == 24
    with pytest.raises(
        ValueError, match=r"trained with width and max_depth \(10, 6\), this environment has \(10, 12\)"
    ):
        DepthControl().compose(*agents.load(partner))
    with pytest.raises(
        ValueError, match="the partner is a policy of SpecDepth-v0, but a policy of SpecDepth-v0 takes a budget policy"
    ):
        DepthControl(max_depth=6).compose(*agents.load(run))
    seen = control.observation_space.sample()
    assert agent.predict(seen, deterministic=True)[0] == depth.predict(seen, deterministic=True)[0]


def test_unreadable_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a readable run folder .*expected one written by `spec-envs train`"):
        agents.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"SpecX-v0 is not a readable run folder .* agent is shipped: SpecBudget-v0, "):
        agents.load("SpecX-v0")
    with pytest.raises(ValueError, match=r"no agent is shipped for SpecTopK-v0, only for SpecBudget-v0, .*give the"):
        agents.load("SpecTopK-v0")
    (tmp_path / "config.yml").write_text("id: SpecDepth-v0\n")
    with pytest.raises(ValueError, match="lacks agent, env, hyperparameters"):
        agents.load(tmp_path)
    run = write_run(tmp_path / "run", AGENTS["ppo"](control=DepthControl(), pi_arch=[8]))
    with pytest.raises(ValueError, match=r"cannot read the policy .*policy.safetensors"):
        agents.load(run)  # the config describes another network
    (run / "policy.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="cannot read the policy"):
        agents.load(run)


def test_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    agent = AGENTS["dqn"](control=DepthControl(), seed=0, buffer_size=500)
    seen = agent.model.replay_buffer.observations
    seen[:] = np.random.default_rng(0).random(seen.shape)
    (tmp_path / "policy.safetensors").write_bytes(b"the one before")
    for write, name in (
        (agent.save, "policy.safetensors"),
        (agent.save_checkpoint, "checkpoint.pt"),
        (lambda folder: write_torch(folder / "last.pt", {"x": torch.zeros(2000)}), "last.pt"),
        (lambda folder: write_json(folder / "results.json", list(range(2000))), "results.json"),
        (lambda folder: recording.save_shard(folder / "0.safetensors", {"x": torch.zeros(2000)}, {}), "0.safetensors"),
    ):
        with pytest.raises(OSError, match=rf"could not write .*{name}: .*; free some space"), file_size_limit(2000):
            write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.safetensors"]
    assert (tmp_path / "policy.safetensors").read_bytes() == b"the one before"
