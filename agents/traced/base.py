"""What agents that learn from a trace have in common: a small network, and rounds of lessons to fit it to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from spec_envs.agents.deciding import Deciding
from spec_envs.agents.exits.journal import Journal
from spec_envs.agents.timing import REPEATS, cold_seconds, priced_network
from spec_envs.agents.traced.lessons import Lessons, replay_of, taught
from spec_envs.controls.base import Control
from spec_envs.controls.plans import Plans
from spec_envs.sealed import first_line, number_of, read_weights, write_weights
from spec_envs.vector.env import ReplayVectorEnv

FILE = "policy.safetensors"
READS = ("cycle", "everything")
LOGGED = 10  # steps between lines of the log
KNOWN = 4096  # decisions that are remembered; before anything is drafted, a cycle looks like many others


def weighed(control: Control) -> Plans:
    """Return the plans of a control, which an agent can weigh at every decision.

    Raises:
        ValueError: there are none, they have no price of their own, or what is drafted is not observed.
    """
    plans = control.plans().settled()
    if plans.stepwise and plans.shown is None:
        raise ValueError(f'the observation {control.observation!r} lacks what is drafted; pass observation="default"')
    return plans


class TracedAgent(Deciding):
    """An agent that is fitted to all that a trace knows, over rounds: in the first the lessons are those of random play,
    in each further one those of what was learned in the last are added.

    Args:
        control: of trees or chains.
        outputs: of the network.
        activation: between its layers, and the same in NumPy, which may write into its argument.
        hidden: units of each of the two hidden layers; beyond 96, BLAS takes threads for a decision (see ``bare.in_numpy``).
        cycles: that are looked at in each round.
        rounds, steps, batch_size: optimiser's steps in each round, and cycles of a step. Many steps learn few texts by heart.
        learning_rate: at the beginning; it falls to 0 on half a cosine.
        seed: of everything that is drawn.
        reads: "cycle": of an observation only what the cycle under way has drafted, where a decision can know that; or
            "everything", also how earlier cycles went, the task, the position: of few texts, that is learned by heart.

    Attributes:
        looks_at: names of the entries of an observation that it reads.
        decision_seconds: time of one decision; measured when the agent is made, then kept with its weights.
    """

    def __init__(
        self,
        control: Control,
        outputs: int,
        activation: tuple[type[nn.Module], Callable[[np.ndarray], np.ndarray]],
        hidden: int = 64,
        cycles: int = 8192,
        rounds: int = 2,
        steps: int = 200,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        seed: int = 0,
        reads: str = "cycle",
    ):
        self.control, self.plans = control, weighed(control)
        self.cycles, self.rounds, self.steps, self.batch_size = cycles, rounds, steps, batch_size
        self.learning_rate, self.weight_decay, self.seed = learning_rate, weight_decay, seed
        if reads not in READS:
            raise ValueError(f"reads is {reads!r}; expected one of {', '.join(READS)}")
        assert control.observation_space.shape is not None
        self.width = (control.own if reads == "cycle" else 0) or control.observation_space.shape[0]
        self.looks_at = [name for name, place in control.slices.items() if place.start < self.width]
        torch.manual_seed(seed)
        between, self.activation = activation
        self.network = nn.Sequential(
            nn.Linear(self.width, hidden), between(), nn.Linear(hidden, hidden), between(), nn.Linear(hidden, outputs)
        )
        self._unpack()

    @abstractmethod
    def actions(self, observations: np.ndarray) -> np.ndarray:
        """An action for each of the observations ``[n, …]``."""

    @abstractmethod
    def fit(self, lessons: Lessons, new: Lessons, env: ReplayVectorEnv) -> Iterator[float]:
        """Learn from all lessons so far, of which ``new`` are those of the last round; the loss of each step."""

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """The action for one observation; nothing is drawn, so that of one that was seen before is known."""
        seen = np.asarray(observation, np.float32)[: self.width]
        key = seen.tobytes()
        if key not in self.known:
            if len(self.known) == KNOWN:
                self.known.clear()
            self.known[key] = int(self.actions(seen[None])[0])
        return self.known[key], state

    def learn(
        self,
        total_timesteps: int = 0,
        env: gym.Env | ReplayVectorEnv | None = None,
        folder: Path | None = None,
        checkpoint_freq: int = 2048,
    ) -> Self:
        """Learn from a trace.

        Args:
            total_timesteps: ignored; how much is looked at stands in the hyper-parameters.
            env: one that replays a trace.
            folder: of the run, for ``log.jsonl`` and TensorBoard; learning takes seconds and begins anew if it was killed.
            checkpoint_freq: ignored.

        Raises:
            ValueError: an environment without a trace.
        """
        if env is None:
            raise ValueError(f"{type(self).__name__} learns from a trace; pass env=, made with trace=FOLDER")
        vector = replay_of(env)
        rng = np.random.default_rng(self.seed)
        torch.manual_seed(self.seed)
        lessons: Lessons | None = None
        name = type(self).__name__.removesuffix("Agent").lower()
        journal = Journal(folder, 0, 0, {"agent": name, "seed": self.seed}, name, "loss")
        for number in range(self.rounds):
            actor = self.actions if number else lambda seen: rng.integers(vector.choices, size=len(seen))
            new = taught(vector, actor, self.plans, self.cycles, self.seed + number)
            lessons = new if lessons is None else Lessons(*map(np.concatenate, zip(lessons, new, strict=True)))
            for step, loss in enumerate(self.fit(lessons, new, vector), number * self.steps + 1):
                if step % LOGGED == 0:
                    journal.write("log", {"step": step, "round": number + 1, "loss": loss})
        journal.close()
        return self

    def optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """For one round."""
        adam = torch.optim.AdamW(self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)

    def outputs(self, x: np.ndarray) -> np.ndarray:
        """The network in NumPy, by which a decision costs a tenth of one by torch."""
        *hidden, (weight, bias) = self.layers
        x = x[..., : self.width]
        for w, b in hidden:
            x = x @ w
            x += b
            x = self.activation(x)
        return x @ weight + bias

    def _unpack(self) -> None:
        """The network's weights as arrays."""
        self.known: dict[bytes, int] = {}
        linear = [module for module in self.network if isinstance(module, nn.Linear)]
        self.layers = [(m.weight.detach().numpy().T.copy(), m.bias.detach().numpy().copy()) for m in linear]

    def measure(self) -> float:
        """Median seconds of a decision that is not known yet."""
        self.known.clear()
        space = self.control.observation_space
        seen = iter(np.random.default_rng(0).random((REPEATS, *(space.shape or (0,))), np.float32))
        return cold_seconds(lambda: self.predict(next(seen)))

    @property
    def priced_seconds(self) -> float:
        """Seconds of a decision under a cost table."""
        return priced_network(self.network)

    def state(self) -> dict[str, np.ndarray]:
        """What is saved beside the network."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take it back."""

    def save(self, folder: Path) -> None:
        """Write the weights."""
        beside = {name: torch.from_numpy(array) for name, array in self.state().items()}
        weights = {**self.network.state_dict(), **beside}
        write_weights(folder / FILE, weights, decision_seconds=repr(self.decision_seconds))

    def load(self, folder: Path) -> None:
        """Read them.

        Raises:
            ValueError: none there, damaged ones, or those of another control.
        """
        path, remedy = folder / FILE, "delete it to train again"
        tensors, metadata = read_weights(path, "the policy in", remedy)
        self.decision_seconds = number_of(metadata, "decision_seconds", path, remedy)
        try:
            self.network.load_state_dict({name: tensors[name] for name in self.network.state_dict()})
            self.restore({name: tensor.numpy() for name, tensor in tensors.items()})
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read the policy in {path}: {first_line(error)}; {remedy}") from None
        self._unpack()
