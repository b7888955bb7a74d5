"""The base class of agents that learn from a trace: a small network, and rounds of lessons that it is fitted to."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field
from torch import nn

from spec_envs.agents.base import Agent
from spec_envs.agents.journal import Journal
from spec_envs.agents.run import Run
from spec_envs.agents.settings import Amount, Count, Natural, SeededSettings, choices
from spec_envs.agents.timing import REPEATS, cold_seconds, priced_network
from spec_envs.agents.traced.lessons import Lessons, collected, replay_of
from spec_envs.controls.base import Control
from spec_envs.controls.plans import Plans
from spec_envs.decoding.traces.trace import Trace
from spec_envs.sealed import first_line, number_of, read_weights, write_weights
from spec_envs.vector.env import ReplayVectorEnv

FILE = "policy.safetensors"
LOGGED = 10  # steps between lines of the log
KNOWN = 4096  # decisions that are remembered: before anything is drafted, cycles look alike


def weighed(control: Control) -> Plans:
    """Return the plans of a control, which an agent can weigh at every decision.

    Raises:
        ValueError: there are none, they have no price of their own, or what is drafted is not observed.
    """
    plans = control.plans().settled()
    if plans.stepwise and plans.shown is None:
        raise ValueError(f'the observation {control.observation!r} lacks what is drafted; pass observation="default"')
    return plans


class TracedAgent(Agent):
    """An agent that is fitted to all that a trace knows, over rounds. The first round has the lessons of random
    decisions; each further one adds the lessons of the policy that the round before it left.

    Args:
        control: of trees or chains.
        outputs: numbers that the network returns.
        activation: between its layers, and the same in NumPy, which may write into its argument.

    Attributes:
        plans: of the control, with the prices of the drafter that was learned from.
        width: how many of an observation's first numbers the network reads.
        looks_at: names of the entries of an observation that it reads.
        decision_seconds: seconds of one decision, measured when the agent is made and then saved with its weights.
    """

    class Settings(SeededSettings):
        hidden: Count = Field(
            64, description="units of each of the two hidden layers; above 96, BLAS takes threads for a decision"
        )
        cycles: Count = Field(8192, description="lessons of each round")
        rounds: Natural = Field(2, description="rounds of lessons")
        steps: Count = Field(200, description="steps of the optimiser in a round; many overfit few texts")
        batch_size: Count = Field(256, description="lessons in a batch of the optimiser")
        learning_rate: Amount = Field(
            3e-3, description="learning rate at the beginning of a round; it falls to 0 along half a cosine"
        )
        weight_decay: Amount = Field(1e-2, description="weight decay of AdamW")
        reads: Literal["cycle", "everything"] = Field(
            "cycle",
            description='"cycle": read only what the current cycle has drafted, where that is known when it '
            'is decided; "everything": also earlier cycles, task and position, which overfits few texts',
        )

    settings: Settings
    problems = ("depth", "budget", "tree", "k", "drafter")
    learns_from = "trace"

    def __init__(
        self,
        control: Control,
        outputs: int,
        activation: tuple[type[nn.Module], Callable[[np.ndarray], np.ndarray]],
        **hyperparameters: Any,
    ):
        super().__init__(control, **hyperparameters)
        self.plans = weighed(control)
        hidden, reads = self.settings.hidden, self.settings.reads
        self.width = (control.draft_columns if reads == "cycle" else 0) or len(control.observation_space.low)
        self.looks_at = [name for name, place in control.slices.items() if place.start < self.width]
        torch.manual_seed(self.settings.seed)
        between, self.activation = activation
        sizes = ((self.width, hidden), (hidden, hidden), (hidden, outputs))
        first, second, self.last = (nn.Linear(*ends) for ends in sizes)
        self.network = nn.Sequential(first, between(), second, between(), self.last)
        self._unpack()

    def describe(self, block: int | None, copied: int) -> None:
        """Tell the plans how the drafter that is learned from drafts; see ``Plans``."""
        self.plans = dataclasses.replace(self.plans, block=block, copied=copied)

    @abstractmethod
    def actions(self, observations: np.ndarray) -> np.ndarray:
        """Return an action ``[n]`` for each of the observations ``[n, …]``."""

    @abstractmethod
    def fit(self, lessons: Lessons, new: Lessons, env: ReplayVectorEnv) -> Iterator[float]:
        """Learn from all lessons so far, of which ``new`` are those of the last round; yield the loss of each step."""

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """Return the action for one observation. Nothing is drawn, so the actions of the last observations are
        remembered."""
        seen = np.asarray(observation, np.float32)[: self.width]
        key = seen.tobytes()
        if key not in self.known:
            if len(self.known) == KNOWN:
                self.known.clear()
            self.known[key] = int(self.actions(seen[None])[0])
        return self.known[key], state

    def learn(self, total_timesteps: int, env: gym.Env | ReplayVectorEnv, run: Run | None = None) -> Self:
        """Learn from a trace. Learning takes seconds and starts over if it was killed: it writes no checkpoints.

        Args:
            total_timesteps: ignored; ``cycles`` and ``rounds`` set how much is learned from.
            env: an environment that replays a trace.
            run: gets ``log.jsonl`` and TensorBoard events.

        Raises:
            ValueError: an environment without a trace.
        """
        vector = replay_of(env)
        if isinstance(vector.trace, Trace):  # plans of several drafters have a price for each of them
            manifest, depth = vector.trace.manifest, self.control.max_depth
            self.describe(block=manifest.rows_of_block(depth), copied=manifest.copied_whole(depth))
        rng = np.random.default_rng(self.settings.seed)
        torch.manual_seed(self.settings.seed)
        lessons: Lessons | None = None
        name = type(self).__name__.removesuffix("Agent").lower()
        journal = Journal((run or Run()).folder, 0, 0, {"agent": name, "seed": self.settings.seed}, name, "loss")
        for number in range(self.settings.rounds):
            actor = self.actions if number else lambda seen: rng.integers(vector.choices, size=len(seen))
            new = collected(vector, actor, self.plans, self.settings.cycles, self.settings.seed + number)
            lessons = new if lessons is None else Lessons(*map(np.concatenate, zip(lessons, new, strict=True)))
            for step, loss in enumerate(self.fit(lessons, new, vector), number * self.settings.steps + 1):
                if step % LOGGED == 0:
                    journal.write("log", {"step": step, "round": number + 1, "loss": loss})
        journal.close()
        return self

    def space(self, trial: Any) -> dict[str, Any]:
        hidden = choices(self.settings.hidden, 16, 32, 64, 96)
        return {
            "steps": trial.suggest_int("steps", 50, 1000, log=True),
            "learning_rate": trial.suggest_float("learning_rate", 3e-4, 3e-2, log=True),
            "hidden": trial.suggest_categorical("hidden", hidden),
        }

    def optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return the optimiser of one round, and the schedule of its learning rate."""
        adam = torch.optim.AdamW(
            self.network.parameters(), self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.settings.steps)

    def outputs(self, x: np.ndarray) -> np.ndarray:
        """Return what the network does, ``[…, outputs]``, computed in NumPy, which takes a tenth of PyTorch's time."""
        *hidden, (weight, bias) = self.layers
        x = x[..., : self.width]
        for w, b in hidden:
            x = x @ w
            x += b
            x = self.activation(x)
        outputs: np.ndarray = x @ weight + bias
        return outputs

    def _unpack(self) -> None:
        """Copy the network's weights into arrays."""
        self.known: dict[bytes, int] = {}
        linear = [module for module in self.network if isinstance(module, nn.Linear)]
        self.layers = [(m.weight.detach().numpy().T.copy(), m.bias.detach().numpy().copy()) for m in linear]

    def measure(self) -> float:
        """Return the median seconds of a decision that is not remembered."""
        self.known.clear()
        space = self.control.observation_space
        seen = iter(np.random.default_rng(0).random((REPEATS, *(space.shape or (0,))), np.float32))
        return cold_seconds(lambda: self.predict(next(seen)))

    @property
    def priced_seconds(self) -> float:
        """Seconds of a decision under a cost table, which prices the network instead of timing it."""
        return priced_network(self.network)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays that are saved beside the network."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Restore what ``state`` returned."""

    def save(self, folder: str | Path) -> None:
        """Write the weights."""
        beside = {name: torch.from_numpy(array) for name, array in self.state().items()}
        weights = {**self.network.state_dict(), **beside}
        write_weights(Path(folder) / FILE, weights, decision_seconds=repr(self.decision_seconds))

    def load(self, folder: str | Path) -> None:
        """Read the weights that ``save`` wrote.

        Raises:
            ValueError: there are none, they are damaged, or they are those of another control.
        """
        path, remedy = Path(folder) / FILE, "delete it to train again"
        tensors, metadata = read_weights(path, "the policy in", remedy)
        self.decision_seconds = number_of(metadata, "decision_seconds", path, remedy)
        try:
            self.network.load_state_dict({name: tensors[name] for name in self.network.state_dict()})
            self.restore({name: tensor.numpy() for name, tensor in tensors.items()})
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read the policy in {path}: {first_line(error)}; {remedy}") from None
        self._unpack()
