from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import DQN

from spec_envs.agents import AGENTS
from spec_envs.agents.sb3.agent import SB3Agent
from spec_envs.agents.sb3.ddqn import DoubleDQN, double_target
from spec_envs.controls.depth import DepthControl
from tests.support.identity import Identity


class Toy(Identity):
    """The toy environment, with the attribute of a control that an agent reads."""

    exit = None

    def __init__(self) -> None:
        super().__init__(spaces.Box(0, 1, (3,), np.float32), spaces.Discrete(2))


def agent(**given: Any) -> SB3Agent:
    """Return a small ddqn agent for the toy problem."""
    small = {"pi_arch": [32, 32], "activation": "relu", "learning_rate": 1e-3, "seed": 0}
    made = AGENTS["ddqn"](control=Toy(), **small | given)
    assert isinstance(made.model, DoubleDQN)
    return made


def test_double_target_selects_online_and_evaluates_target() -> None:
    online = {0: [1.0, 3.0, 2.0], 1: [0.0, 0.0, 5.0]}
    target = {0: [10.0, 4.0, 7.0], 1: [9.0, 8.0, -2.0]}

    def table(values: dict[int, list[float]]) -> Any:
        return lambda states: torch.tensor([values[int(s)] for s in states])

    rewards, states = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0])
    dones = torch.tensor([[0.0], [0.0], [1.0]])
    found = double_target(table(online), table(target), rewards, dones, states, 0.5)
    assert found.tolist() == [[1 + 0.5 * 4], [2 + 0.5 * -2], [3]]  # the plain maximum would give 6 and 6.5


@pytest.mark.parametrize(("loss", "expected"), [("mse", 4.0), ("huber", 1.5)])
def test_training_uses_double_target(loss: str, expected: float) -> None:
    """The networks are constant: online predicts (0, 1), target (5, 1), whose maximum is 5."""
    model = agent(loss=loss, gamma=1.0, batch_size=4, target_update_updates=None).model
    for network, values in ((model.q_net, [0.0, 1.0]), (model.q_net_target, [5.0, 1.0])):
        for parameter in network.parameters():
            parameter.data.zero_()
        network.q_net[-1].bias.data = torch.tensor(values)
    seen = np.zeros((1, 3), np.float32)
    for _ in range(4):
        model.replay_buffer.add(seen, seen, np.array([0]), np.array([1.0]), np.array([0.0]), [{}])
    logged = {}
    model.set_logger(type("Log", (), {"record": lambda _, key, value, exclude=None: logged.update({key: value})})())
    model._current_progress_remaining = 1.0
    model.train(1, 4)
    assert logged["train/loss"] == pytest.approx(expected)  # of 0 against 1 + 1


def test_learns_known_optimum() -> None:
    learnt = agent(gamma=0.5, exploration_final_eps=0.05, learning_rate=3e-3).learn(2000, Toy())
    seen = np.random.default_rng(1).random((200, 3)).astype(np.float32)
    assert np.mean([learnt.predict(x, deterministic=True)[0] == int(x[0] > 0.5) for x in seen]) > 0.95


def test_exploration_and_target_copies_depend_on_updates() -> None:
    made = agent(learning_starts=20)
    model = made.model
    assert model.exploration_rate == 1.0
    made.learn(45, Toy())
    assert model._n_updates == 25
    assert model.exploration_rate == pytest.approx(0.995**25)
    online, target = (list(network.parameters()) for network in (model.q_net, model.q_net_target))
    assert not all(map(torch.equal, online, target))
    made.learn(50, Toy())
    assert model._n_updates == 30 and all(map(torch.equal, online, target))
    model._n_updates = 5000
    assert model.exploration_rate == 0.01


def test_checkpoint_restores_exploration_and_target(tmp_path: Path) -> None:
    made = agent(learning_starts=20).learn(45, Toy())
    made.save_checkpoint(tmp_path)
    resumed = agent(learning_starts=20)
    resumed.load_checkpoint(tmp_path)
    model = resumed.model
    assert model.exploration_rate == made.model.exploration_rate == pytest.approx(0.995**25)
    for mine, other in zip(model.q_net_target.parameters(), made.model.q_net_target.parameters(), strict=True):
        assert torch.equal(mine, other)
    resumed.learn(50, Toy())
    assert model._n_updates == 30 and model.replay_buffer.size() == 50
    assert all(map(torch.equal, model.q_net.parameters(), model.q_net_target.parameters()))


def test_schedules_of_stable_baselines_without_own_settings() -> None:
    """Without the new settings ε falls linearly, and the target is copied after a number of environment steps."""
    own = {"epsilon_decay": None, "target_update_updates": None, "learning_starts": 20}
    both = {"exploration_fraction": 0.5, "exploration_final_eps": 0.1, "target_update_interval": 30}
    model = agent(**own, **both).learn(40, Toy()).model
    theirs = DQN("MlpPolicy", Toy(), seed=0, learning_starts=20, train_freq=1, **both).learn(40)
    assert model.exploration_rate == theirs.exploration_rate == pytest.approx(0.1)
    assert model.target_update_interval == 30
    halfway = agent(**own, **both).learn(30, Toy()).model
    assert halfway.num_timesteps == 30 and halfway._n_updates == 10


def test_model_saves_and_loads_with_stable_baselines(tmp_path: Path) -> None:
    model = agent(learning_starts=20).learn(45, Toy()).model
    model.save(tmp_path / "model.zip")
    again = DoubleDQN.load(tmp_path / "model.zip")
    assert again.exploration_rate == model.exploration_rate and again.target_update_updates == 10
    assert torch.equal(again.q_net.q_net[0].weight, model.q_net.q_net[0].weight)


def test_defaults_are_published_ones() -> None:
    model = DoubleDQN("MlpPolicy", Toy())
    assert (model.learning_rate, model.gamma, model.buffer_size, model.batch_size) == (1e-3, 0.99, 10_000, 64)
    assert (model.learning_starts, model.train_freq.frequency, model.loss) == (64, 1, "mse")
    assert (model.epsilon_decay, model.exploration_final_eps, model.target_update_updates) == (0.995, 0.01, 10)
    assert math.isinf(model.max_grad_norm)


def test_predict_equals_stable_baselines() -> None:
    control = DepthControl()
    made = AGENTS["ddqn"](control=control, seed=3, pi_arch=[256, 256, 256], activation="relu")
    rng = np.random.default_rng(0)
    for seen in rng.random((20, *control.observation_space.shape)).astype(np.float32):
        assert made.predict(seen, deterministic=True)[0] == int(made.model.predict(seen, deterministic=True)[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon_decay": 1.5}, "epsilon_decay is 1.5; expected a factor above 0 up to 1, or null"),
        ({"target_update_updates": 0}, "target_update_updates is 0; expected 1 or more, or null"),
        ({"loss": "mae"}, "loss is 'mae'; expected one of mse, huber"),
        ({"base": 1}, "unknown hyper-parameter 'base' of DoubleDQNAgent"),
    ],
)
def test_invalid_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent(**given)
