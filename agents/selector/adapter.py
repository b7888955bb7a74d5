"""The published selector of k for speculation over a link, which learns while it serves. It needs no environment."""

from __future__ import annotations

import argparse
import copy
import zipfile
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from spec_envs.agents.sb3.ddqn import double_target
from spec_envs.agents.sb3.deployed import Bare
from spec_envs.agents.settings import Count, SeededSettings, Share
from spec_envs.controls.observation.rl_adapter_state import KS, TASKS_PUBLISHED, UNITS, published_state
from spec_envs.decoding.weights.checkpoints import resolve_device
from spec_envs.files import whole
from spec_envs.sealed import read_torch, write_torch

STATE = len(UNITS) + len(TASKS_PUBLISHED)
FILE = "rl_adapter.pth"
LARGEST = 1 << 30  # bytes of a replay buffer's file, unpacked


class SelectorSettings(SeededSettings):
    """Hyper-parameters, by default the published ones."""

    learning_rate: Share = Field(1e-3, description="learning rate of Adam")
    gamma: Share = Field(0.99, description="discount of the next decision's value")
    epsilon: Share = Field(1.0, description="share of random actions at first")
    epsilon_min: Share = Field(0.01, description="share of random actions in the end")
    epsilon_decay: Share = Field(0.995, description="factor of that share per update")
    buffer_size: Count = Field(10_000, description="transitions that are remembered")
    batch_size: Count = Field(64, description="transitions of an update, and those before the first one")
    target_update: Count = Field(10, description="updates between copies into the target network")
    path: str | Path | None = Field(
        Path("checkpoints") / FILE, description="checkpoint that is read at the beginning if it is there; None is none"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.buffer_size < self.batch_size:
            raise ValueError(f"buffer_size is {self.buffer_size}; expected at least a batch ({self.batch_size})")
        return self


def settings(args: argparse.Namespace | dict[str, Any] | None) -> SelectorSettings:
    """Return the hyper-parameters, given those that a caller overrides.

    Raises:
        ValueError: an unknown name (the nearest one is named), or a value out of its range.
    """
    if isinstance(args, argparse.Namespace):  # a host program's own, which has much else
        args = {name: value for name, value in vars(args).items() if name in SelectorSettings.model_fields}
    return SelectorSettings.read(args or {}, "the adapter")


class QNetwork(nn.Module):
    """The value of each k in a state: ``[batch, 10]`` to ``[batch, 11]``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(STATE, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc3 = nn.Linear(256, 256)
        self.fc4 = nn.Linear(256, len(KS))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = self.layers()(states)
        return values

    def layers(self) -> nn.Sequential:
        """Return the same layers with the activations between them."""
        return nn.Sequential(self.fc1, nn.ReLU(), self.fc2, nn.ReLU(), self.fc3, nn.ReLU(), self.fc4)


class Replay:
    """The last transitions, a ring of arrays."""

    def __init__(self, size: int):
        self.columns: dict[str, np.ndarray] = {
            "states": np.zeros((size, STATE), np.float32),
            "actions": np.zeros((size, 1), np.int64),
            "rewards": np.zeros((size, 1), np.float32),
            "next_states": np.zeros((size, STATE), np.float32),
            "dones": np.zeros((size, 1), np.float32),
        }
        self.size, self.added = size, 0

    def __len__(self) -> int:
        return min(self.added, self.size)

    def add(self, *transition: Any) -> None:
        """Add a transition: a state, action, reward, next state and whether the episode ended."""
        for column, value in zip(self.columns.values(), transition, strict=True):
            column[self.added % self.size] = value
        self.added += 1

    def sample(self, count: int, rng: np.random.Generator, device: torch.device) -> list[torch.Tensor]:
        """Return different transitions, column by column."""
        rows = rng.choice(len(self), count, replace=False)
        return [torch.from_numpy(column[rows]).to(device) for column in self.columns.values()]

    def state(self) -> dict[str, np.ndarray]:
        """Return what there is by column, the oldest first."""
        order = np.arange(self.added - len(self), self.added) % self.size
        return {name: column[order] for name, column in self.columns.items()}

    def take(self, columns: dict[str, np.ndarray]) -> None:
        """Remember the newest transitions of these, as many as there is room for.

        Raises:
            ValueError: they are not what ``state`` returns.
        """
        columns = {name: columns[name][-self.size :] for name in self.columns}
        count = len(columns["states"])
        for name, column in self.columns.items():
            if columns[name].shape != (count, *column.shape[1:]) or columns[name].dtype != column.dtype:
                raise ValueError("another shape or type")
        if not all(np.isfinite(column).all() for column in columns.values()):
            raise ValueError("numbers that are not finite")
        if count and not 0 <= columns["actions"].min() <= columns["actions"].max() < len(KS):
            raise ValueError("actions that do not exist")
        for name, column in self.columns.items():
            column[:count] = columns[name]
        self.added = count

    def save(self, path: Path) -> None:
        """Write what there is as an npz."""
        arrays: dict[str, Any] = self.state()
        with whole(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def load(self, path: Path) -> None:
        """Read the newest transitions of a file, as many as there is room for.

        Raises:
            ValueError: a file that :meth:`save` did not write.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > LARGEST:
                    raise ValueError("it unpacks to more than a replay buffer has")
            with np.load(path, allow_pickle=False) as file:
                self.take({name: file[name] for name in self.columns})
        except Exception as error:  # zip, zlib, NumPy and its tokenizer each have their own for a damaged file
            raise ValueError(
                f"{path} is not a replay buffer written by this adapter (a pickled one is never opened, for it can run "
                "any code); delete it, or continue without it by load(path, buffer=False): the networks load without it"
            ) from error


class RLNetworkAdapter:
    """Chooses how many entries of each draft distribution are sent over a link, and learns while it does: double
    Q-learning (arXiv 1509.06461) with the published selector's settings.

    Args:
        args: overrides of :class:`SelectorSettings` by name.
        device: where it learns; it decides on the CPU.

    Attributes:
        epsilon, update_count: share of random actions while training, and gradient updates so far.

    Raises:
        ValueError: an unknown setting, a value out of its range, or a checkpoint at ``path`` that cannot be read.
    """

    def __init__(self, args: argparse.Namespace | dict[str, Any] | None = None, device: str = "cpu"):
        self.settings, self.device = settings(args), resolve_device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.policy_net = QNetwork().to(self.device)
        self.target_net = copy.deepcopy(self.policy_net)
        self.optimizer = self._optimizer(self.policy_net)
        self.replay = Replay(self.settings.buffer_size)
        self.rng = np.random.default_rng(self.settings.seed)
        self.epsilon, self.update_count = self.settings.epsilon, 0
        self._deployed: Bare | None = None
        if self.settings.path is not None and Path(self.settings.path).exists():
            self.load()

    def select_k(
        self,
        bandwidth_mbps: float,
        latency_ms: float,
        draft_acc_prob: float,
        entropy: float,
        task_name: str,
        training: bool = False,
    ) -> int:
        """Return the k for the next round, a member of ``KS``; a random one with probability ε if ``training``."""
        return KS[self.act(published_state(bandwidth_mbps, latency_ms, draft_acc_prob, entropy, task_name), training)]

    def act(self, state: np.ndarray, training: bool = False) -> int:
        """Return the place in ``KS`` of the k for a state ``[10]``."""
        if training and self.rng.random() < self.epsilon:
            return int(self.rng.integers(len(KS)))
        if self._deployed is None:  # the networks changed
            self._deployed = Bare(copy.deepcopy(self.policy_net).cpu().layers(), logits=False)
        return int(self._deployed(np.asarray(state, np.float32), None)[0].argmax())

    def record(self, state: np.ndarray, action: int, reward: float, next_state: np.ndarray, done: bool) -> float | None:
        """Remember the results of a round and learn from a batch with :meth:`update`.

        Args:
            state, next_state: ``[10]``, of :func:`published_state`.
            action: the place of the k in ``KS``, as of :meth:`act`; ``KS.index(k)`` for a k.
            reward: accepted tokens over seconds of the round, those of the transfer that k caused included.
            done: nothing follows (``next_state`` counts for nothing).

        Raises:
            ValueError: another action, or numbers that are not finite, which would spoil the networks for good.
        """
        if not 0 <= action < len(KS):
            raise ValueError(f"action is {action}; expected a place in KS, 0 to {len(KS) - 1}: of a k, KS.index(k)")
        if not np.isfinite(reward):
            raise ValueError(f"reward is {reward}; expected a finite number, such as accepted tokens over seconds")
        for name, numbers in (("state", state), ("next_state", next_state)):
            if np.shape(numbers) != (STATE,) or not np.isfinite(numbers).all():
                raise ValueError(f"{name} is not {STATE} finite numbers; expected what published_state() gives")
        self.replay.add(state, action, reward, next_state, done)
        return self.update()

    def update(self) -> float | None:
        """Make one gradient update on a batch of remembered transitions, and return its loss, or None while there is
        less than a batch."""
        if len(self.replay) < self.settings.batch_size:
            return None
        batch = self.replay.sample(self.settings.batch_size, self.rng, self.device)
        states, actions, rewards, next_states, dones = batch
        wanted = double_target(self.policy_net, self.target_net, rewards, dones, next_states, self.settings.gamma)
        loss = nn.functional.mse_loss(self.policy_net(states).gather(1, actions), wanted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._deployed = None
        self.update_count += 1
        self.epsilon = max(self.settings.epsilon_min, self.epsilon * self.settings.epsilon_decay)
        if self.update_count % self.settings.target_update == 0:
            self.target_net.load_state_dict(self.policy_net.state_dict())
        return loss.item()

    def save(self, path: str | Path | None = None) -> None:
        """Write the checkpoint, and beside it what is remembered with the suffix ``.buffer``.

        Raises:
            ValueError: no path, neither here nor in the settings.
            OSError: a file could not be written.
        """
        file = self._path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.replay.save(beside(file))
        write_torch(file, self.state())

    def state(self) -> dict[str, Any]:
        """Return the published checkpoint's contents."""
        return {
            "policy_net": self.policy_net.state_dict(),
            "target_net": self.target_net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epsilon": self.epsilon,
            "update_count": self.update_count,
        }

    def load(self, path: str | Path | None = None, buffer: bool = True) -> None:
        """Continue from a checkpoint; what was learned and remembered before is forgotten.

        Args:
            buffer: read what is remembered there, too, if there is such a file.

        Raises:
            ValueError: no path, or a file that cannot be read or is no such checkpoint; nothing has changed then.
        """
        file = self._path(path)
        try:
            file.open("rb").close()
        except OSError as error:
            raise ValueError(f"cannot read the checkpoint {file}: {error.strerror or error}") from None
        replay = Replay(self.settings.buffer_size)
        if buffer and beside(file).exists():
            replay.load(beside(file))
        try:
            self.restore(read_torch(file, "the checkpoint", "train again"), replay)
        except Exception as error:  # torch has no one error for a foreign state
            raise ValueError(
                f"{file} is damaged or no checkpoint of this adapter; expected a dict of policy_net, target_net "
                "(finite layers fc1 to fc4, 10-256-256-256-11), optimizer (Adam), epsilon and update_count: train "
                "again, or give another path"
            ) from error

    def restore(self, state: dict[str, Any], replay: Replay) -> None:
        """Continue from what ``state`` returned, with these transitions; where that fails nothing has changed.

        Raises:
            ValueError: numbers out of range; other errors where it is no such state.
        """
        policy_net, target_net = copy.deepcopy(self.policy_net), copy.deepcopy(self.target_net)
        optimizer = self._optimizer(policy_net)
        policy_net.load_state_dict(state["policy_net"])
        target_net.load_state_dict(state["target_net"])
        optimizer.load_state_dict(state["optimizer"])
        epsilon, update_count = float(state["epsilon"]), int(state["update_count"])
        sound = all(w.isfinite().all() for network in (policy_net, target_net) for w in network.parameters())
        for weights, moments in optimizer.state.items():
            sound &= weights.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape
        if not sound or not 0 <= epsilon <= 1 or update_count < 0:
            raise ValueError("numbers out of range")
        for group in optimizer.param_groups:
            group.update(self.optimizer.defaults)  # the settings hold, not those of the time of saving
        self.policy_net, self.target_net, self.optimizer = policy_net, target_net, optimizer
        self.replay, self.epsilon, self.update_count = replay, epsilon, update_count
        self._deployed = None

    def _optimizer(self, network: QNetwork) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=self.settings.learning_rate)

    def _path(self, path: str | Path | None) -> Path:
        chosen = self.settings.path if path is None else path
        if chosen is None:
            raise ValueError("the adapter has no path; pass one here, or as path among its args")
        return Path(chosen)


def beside(checkpoint: Path) -> Path:
    """Return the path of a checkpoint's replay buffer."""
    return checkpoint.with_name(checkpoint.name + ".buffer")
