from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from gymnasium import spaces
from torch import nn

from spec_envs.agents import AGENTS
from spec_envs.agents.sb3.ddqn import double_target
from spec_envs.agents.selector.adapter import RLNetworkAdapter, SelectorSettings, settings
from spec_envs.agents.selector.agent import RLAdapterAgent
from spec_envs.controls.observation.rl_adapter_state import KS, TASKS_PUBLISHED, published_state

LINK = (100.0, 50.0, 0.7, 2.0, "gsm8k")


class Link(gym.Env):
    """A toy link: the best k is the first candidate on a narrow link and the last on a wide one."""

    observation_space = spaces.Box(0, 1, (10,), np.float32)
    action_space = spaces.Discrete(len(KS))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.left = 5
        return self._draw(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        wide = self.seen[0] > 0.5
        reward = 1 - abs(action - (10 if wide else 0)) / 10
        self.left -= 1
        return self._draw(), reward, self.left == 0, False, {}

    def _draw(self) -> np.ndarray:
        wide = self.np_random.random() < 0.5
        self.seen = published_state(900 if wide else 50, 50, 0.7, 2.0, "xsum")
        return self.seen


def control(width: int = 10, actions: int = 11) -> Any:
    """Return an object with the attributes of SpecTopK-v0's control that the agent reads."""
    box = spaces.Box(0, 1, (width,), np.float32)
    return SimpleNamespace(observation_space=box, action_space=spaces.Discrete(actions), slices={})


def adapter(**args: Any) -> RLNetworkAdapter:
    return RLNetworkAdapter({"path": None, **args})


def fill(made: RLNetworkAdapter, count: int) -> None:
    """Record random transitions, which train the adapter."""
    rng = np.random.default_rng(0)
    for i in range(count):
        state, following = rng.random((2, 10)).astype(np.float32)
        made.record(state, int(rng.integers(11)), float(rng.random()), following, i % 7 == 0)


class Published(nn.Module):
    """The published network, written independently of the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(10, 256), nn.Linear(256, 256)
        self.fc3, self.fc4 = nn.Linear(256, 256), nn.Linear(256, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.fc1, self.fc2, self.fc3):
            x = torch.relu(layer(x))
        return self.fc4(x)


def published(path: Path, trained: bool = True, **changes: Any) -> Published:
    """Write a checkpoint without the adapter, and return its network."""
    torch.manual_seed(5)
    net, target = Published(), Published()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    if trained:
        net(torch.rand(8, 10)).pow(2).mean().backward()
        optimizer.step()
    state = {
        "policy_net": net.state_dict(),
        "target_net": target.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epsilon": 0.37,
        "update_count": 198,
    }
    torch.save(state | changes, path)
    return net


def test_published_state() -> None:
    assert len(KS) == 11 and TASKS_PUBLISHED[-1] == "unknown"
    np.testing.assert_allclose(
        published_state(250, 100, 0.8, 2.5, "cnndm"), [0.25, 0.2, 0.8, 0.25, 0, 0, 1, 0, 0, 0], rtol=1e-6
    )
    assert published_state(9e9, 9e9, 2, 99, "json").tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]
    assert published_state(0, 0, -1, -0.1, "mt_bench").tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert published_state(*LINK).dtype == np.float32
    with pytest.raises(ValueError, match="entropy is nan; expected a number"):
        published_state(100, 50, 0.7, float("nan"), "xsum")


def test_explores_only_in_training() -> None:
    made = adapter(seed=3)
    assert {made.select_k(*LINK) for _ in range(50)} < set(KS)
    assert len({made.select_k(*LINK) for _ in range(50)}) == 1
    tried = {made.select_k(*LINK, training=True) for _ in range(300)}
    assert tried == set(KS)  # ε is 1, so every k is tried
    again = adapter(seed=3)
    assert again.select_k(*LINK) == made.select_k(*LINK)
    explored = [a.select_k(*LINK, training=True) for a in (adapter(seed=4), adapter(seed=4)) for _ in range(20)]
    assert explored[:20] == explored[20:]


def test_constructor_keeps_global_random_state() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    adapter(seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_act_is_argmax_of_network() -> None:
    made = adapter(seed=1)
    fill(made, 70)
    states = np.random.default_rng(2).random((50, 10)).astype(np.float32)
    with torch.no_grad():
        expected = made.policy_net(torch.from_numpy(states)).argmax(1).tolist()
    assert [made.act(state) for state in states] == expected


def test_updates_decay_epsilon_and_copy_network() -> None:
    made = adapter(batch_size=16)
    fill(made, 15)
    assert made.update() is None and made.update_count == 0 and made.epsilon == 1.0
    fill(made, 9)
    assert made.update_count == 9 and made.epsilon == pytest.approx(0.995**9)
    assert not torch.equal(made.policy_net.fc1.weight, made.target_net.fc1.weight)
    assert made.update() is not None and made.update_count == 10
    assert torch.equal(made.policy_net.fc1.weight, made.target_net.fc1.weight)
    made.epsilon = 0.010001
    made.update()
    assert made.epsilon == 0.01


def test_update_minimises_error_to_double_target() -> None:
    made = adapter(batch_size=8, gamma=0.9)
    made.target_net.fc4.bias.data += torch.linspace(3, -3, 11)  # so that the two networks have different best actions
    fill(made, 7)
    rng = np.random.default_rng(8)
    state, following = rng.random((2, 10)).astype(np.float32)
    made.replay.add(state, 4, 0.5, following, False)
    columns = [torch.from_numpy(column[:8]) for column in made.replay.columns.values()]
    states, actions, rewards, next_states, dones = columns
    with torch.no_grad():
        wanted = double_target(made.policy_net, made.target_net, rewards, dones, next_states, 0.9)
        largest = rewards + 0.9 * (1 - dones) * made.target_net(next_states).max(1, keepdim=True).values
        error = (made.policy_net(states).gather(1, actions) - wanted).pow(2).mean()
    assert not torch.allclose(wanted, largest)
    assert made.update() == pytest.approx(error.item(), rel=1e-5)


def test_replay_keeps_newest_transitions(tmp_path: Path) -> None:
    made = adapter(buffer_size=10, batch_size=10, path=tmp_path / "a.pth")
    for i in range(25):
        made.replay.add(np.full(10, i), i % 11, i, np.full(10, i), False)
    assert sorted(made.replay.columns["rewards"][:, 0].tolist()) == list(range(15, 25))
    made.save()
    smaller = adapter(buffer_size=4, batch_size=4)
    smaller.load(tmp_path / "a.pth")
    assert smaller.replay.columns["rewards"][:, 0].tolist() == [21, 22, 23, 24]


def test_invalid_transitions_are_refused() -> None:
    state = published_state(*LINK)
    with pytest.raises(ValueError, match=r"action is 500; expected a place in KS, 0 to 10: of a k, KS.index\(k\)"):
        adapter().record(state, 500, 1.0, state, False)
    with pytest.raises(ValueError, match="reward is nan; expected a finite number"):
        adapter().record(state, 5, float("nan"), state, False)
    for other in (state * np.nan, state[:9], 0.5):
        with pytest.raises(ValueError, match="next_state is not 10 finite numbers; expected what published_state"):
            adapter().record(state, 5, 1.0, other, False)


def test_settings_from_namespace_or_dict() -> None:
    assert settings(None) == SelectorSettings() == settings(argparse.Namespace())
    assert settings(argparse.Namespace(gamma=0.5)).gamma == settings({"gamma": 0.5}).gamma == 0.5
    published = {"learning_rate": 1e-3, "gamma": 0.99, "epsilon": 1.0, "epsilon_min": 0.01, "epsilon_decay": 0.995}
    published |= {"buffer_size": 10_000, "batch_size": 64, "target_update": 10}
    assert SelectorSettings().model_dump() == published | {"seed": 0, "path": Path("checkpoints/rl_adapter.pth")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gama": 0.5}, r"unknown hyper-parameter 'gama' of the adapter \(did you mean 'gamma'\?\)"),
        ({"epsilon_decay": 2}, "epsilon_decay is 2; expected a number from 0 to 1"),
        ({"gamma": "0.9"}, "gamma is '0.9'; expected a number from 0 to 1"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of 1 or more"),
        ({"buffer_size": 10}, r"buffer_size is 10; expected at least a batch \(64\)"),
    ],
)
def test_invalid_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RLNetworkAdapter(given)


def test_saves_to_default_path_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = RLNetworkAdapter(device="cpu")
    assert not list(tmp_path.iterdir())
    fill(made, 66)
    made.save()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"rl_adapter.pth", "rl_adapter.pth.buffer"}
    again = RLNetworkAdapter()
    assert again.update_count == made.update_count == 3 and again.epsilon == made.epsilon
    assert len(again.replay) == 66
    for mine, other in zip(again.policy_net.parameters(), made.policy_net.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert again.select_k(*LINK) == made.select_k(*LINK)
    assert again.update() is not None and again.update_count == 4
    state = torch.load(tmp_path / "checkpoints" / "rl_adapter.pth", weights_only=True)
    assert set(state) == {"policy_net", "target_net", "optimizer", "epsilon", "update_count"}
    assert set(state["policy_net"]) == {f"fc{i}.{part}" for i in (1, 2, 3, 4) for part in ("weight", "bias")}


def test_save_without_path_is_refused() -> None:
    with pytest.raises(ValueError, match="the adapter has no path; pass one here"):
        adapter().save()


@pytest.mark.parametrize("trained", [True, False])
def test_loads_published_checkpoint(tmp_path: Path, trained: bool) -> None:
    net = published(tmp_path / "published.pth", trained)
    made = RLNetworkAdapter({"path": tmp_path / "published.pth", "learning_rate": 2e-4})
    assert made.epsilon == 0.37 and made.update_count == 198
    with torch.no_grad():
        expected = KS[int(net(torch.from_numpy(published_state(*LINK))[None]).argmax())]
    assert made.select_k(*LINK) == expected
    fill(made, 64)
    assert made.update_count == 199
    assert made.optimizer.param_groups[0]["lr"] == 2e-4  # the given setting takes precedence over the saved one


def sgd() -> dict[str, Any]:
    """Return the state of an optimizer of another kind."""
    net = Published()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.rand(2, 10)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"policy_net": {}},
        {"target_net": nn.Linear(10, 11).state_dict()},
        {"policy_net": {k: v * float("nan") for k, v in Published().state_dict().items()}},
        {"optimizer": {}},
        {"optimizer": sgd()},
        {"epsilon": 3.0},
        {"epsilon": None},
        {"update_count": -1},
    ],
)
def test_refused_checkpoint_changes_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "foreign.pth"
    published(path, **changes)
    made = adapter()
    before = made.select_k(*LINK), made.epsilon, made.policy_net
    with pytest.raises(
        ValueError, match=r"foreign.pth is damaged or no checkpoint of this adapter; expected a dict of"
    ):
        made.load(path)
    assert (made.select_k(*LINK), made.epsilon, made.policy_net) == before


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    published(tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    pickled = pickle.dumps({"policy_net": SimpleNamespace()}, protocol=2)
    for data in (b"", b"not one", whole[: len(whole) // 2], whole[:-100], pickled, pickle.dumps([1], protocol=2)):
        (tmp_path / "a.pth").write_bytes(data)
        with pytest.raises(ValueError, match=r"a.pth is damaged or no checkpoint of this adapter"):
            adapter().load(tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*b.pth: No such file"):
        adapter().load(tmp_path / "b.pth")


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("sprung"),)


def test_pickled_buffer_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    published(path)
    beside = tmp_path / "a.pth.buffer"
    objects, short = tmp_path / "objects.npz", tmp_path / "short.npz"
    np.savez(objects, states=np.array([Trap()], object))
    np.savez(short, states=np.zeros((2, 3), np.float32))
    for data in (pickle.dumps([Trap()]), objects.read_bytes(), short.read_bytes(), objects.read_bytes()[:-30], b""):
        beside.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"a.pth.buffer is not a replay buffer .*; delete it, or continue without it"
        ):
            RLNetworkAdapter({"path": path})
        made = adapter()
        made.load(path, buffer=False)
        assert made.update_count == 198 and len(made.replay) == 0
    assert not (tmp_path / "sprung").exists()
    beside.unlink()
    assert RLNetworkAdapter({"path": path}).update_count == 198


def test_invalid_buffers_are_refused(tmp_path: Path) -> None:
    made = adapter(path=tmp_path / "a.pth")
    fill(made, 3)
    made.save()
    good = dict(np.load(tmp_path / "a.pth.buffer"))
    for name, value in (
        ("actions", np.full((3, 1), 11)),
        ("rewards", np.full((3, 1), np.inf, np.float32)),
        ("dones", np.zeros((2, 1), np.float32)),
        ("states", good["states"].astype(float)),
    ):
        with (tmp_path / "a.pth.buffer").open("wb") as file:
            np.savez(file, **good | {name: value})
        with pytest.raises(ValueError, match="is not a replay buffer"):
            made.load()


def test_agent_learns_saves_and_loads(tmp_path: Path) -> None:
    agent = AGENTS["rl-adapter"](control=control(), seed=0, gamma=0.0, epsilon_decay=0.99)
    assert isinstance(agent, RLAdapterAgent) and 0 < agent.decision_seconds < 0.1
    agent.learn(900, Link())
    narrow, wide = (published_state(b, 50, 0.7, 2.0, "xsum") for b in (50, 900))
    chosen = [agent.predict(state, deterministic=True)[0] for state in (narrow, wide)]
    assert chosen[0] <= 1 and chosen[1] >= 9
    agent.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"rl_adapter.pth", "rl_adapter.pth.buffer"}
    again = AGENTS["rl-adapter"](control=control(), seed=0)
    again.load(tmp_path)
    assert [again.predict(state, deterministic=True)[0] for state in (narrow, wide)] == chosen
    assert again.adapter.update_count == 900 - 63 and len(again.adapter.replay) == 900
    assert AGENTS["rl-adapter"](control=control(), path=str(tmp_path / "rl_adapter.pth")).adapter.update_count == 837
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*elsewhere"):
        AGENTS["rl-adapter"](control=control(), path=str(tmp_path / "elsewhere"))


def test_agent_learns_from_recorded_transitions() -> None:
    agent = AGENTS["rl-adapter"](control=control(), batch_size=2)
    seen = published_state(*LINK)
    for k in (3, 3):
        agent.record(seen, k, 9.0, seen, True)
    assert agent.adapter.update_count == 1
    for _ in range(200):
        agent.record(seen, 3, 9.0, seen, True)
    assert agent.predict(seen, deterministic=True) == (3, None)
    agent.adapter.epsilon = 1.0
    assert {agent.predict(seen, deterministic=True)[0] for _ in range(50)} == {3}
    assert len({agent.predict(seen)[0] for _ in range(50)}) > 3


def test_training_is_reproducible() -> None:
    first, second = (AGENTS["rl-adapter"](control=control(), seed=5).learn(100, Link()) for _ in range(2))
    assert torch.equal(first.adapter.policy_net.fc4.weight, second.adapter.policy_net.fc4.weight)


def test_agent_refuses_other_spaces() -> None:
    for other in (control(width=12), control(actions=4)):
        with pytest.raises(
            ValueError, match=r'rl-adapter needs \(10,\) and Discrete\(11\), .*observation="rl_adapter"'
        ):
            AGENTS["rl-adapter"](control=other)
    with pytest.raises(ValueError, match=r"unknown hyper-parameter 'learning_rates' .*'learning_rate'"):
        AGENTS["rl-adapter"](control=control(), learning_rates=1)


def test_hyperparameters_are_known_to_configuration() -> None:
    known = set(AGENTS["rl-adapter"].Settings.model_fields)
    assert known == {
        *("seed", "path", "learning_rate", "gamma", "epsilon", "epsilon_min", "epsilon_decay"),
        *("buffer_size", "batch_size", "target_update"),
    }
    agent = AGENTS["rl-adapter"](control=control(), **yaml.safe_load("{gamma: 0.5, target_update: 20}"))
    assert agent.adapter.settings.target_update == 20
