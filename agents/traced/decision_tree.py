"""A decision tree that is distilled from a trained agent: it decides alike, in a fraction of the time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import gymnasium as gym
import numpy as np
import torch
from annotated_types import Ge, Le
from pydantic import Field

from spec_envs import agents
from spec_envs.agents.base import Agent
from spec_envs.agents.journal import Journal
from spec_envs.agents.run import Run
from spec_envs.agents.settings import Count, Natural, SeededSettings
from spec_envs.agents.timing import REPEATS, cold_seconds, priced
from spec_envs.agents.traced.base import FILE, TracedAgent, weighed
from spec_envs.agents.traced.hindsight import HindsightAgent
from spec_envs.agents.traced.lessons import replay_of
from spec_envs.agents.traced.nodes import KINDS, LEAF, Nodes
from spec_envs.controls.base import Control, layout
from spec_envs.sealed import number_of, read_weights, write_weights
from spec_envs.vector.env import ReplayVectorEnv


class Labelled(NamedTuple):
    """Decisions that a teacher has labelled: what was seen ``[n, …]``, the teacher's action ``[n]``, and how much
    depends on it ``[n]``."""

    seen: np.ndarray
    action: np.ndarray
    weight: np.ndarray


class DecisionTreeAgent(Agent):
    """Decides by a small decision tree that imitates a trained agent, its teacher, in a fraction of a network's time
    (VIPER, Bastani et al. 2018, arXiv 1805.08328).

    The teacher labels decisions on the training texts, at first along its own path and then along those of the tree so
    far, which is fitted to all of them. Where `hindsight` teaches, a decision weighs as much as the best action is worth
    more than the second best (in the paper, than the worst); under other teachers all weigh alike. The tree compares only
    what its teacher reads, and while it decodes, only what it compares is observed. `rules()` returns it as text.

    It is for the cost table under which it was distilled: another table needs another tree, while `hindsight` needs
    another price only.

    Args:
        control: of trees or chains that a trace replays.

    Attributes:
        nodes: of the tree. Before anything is learned it makes ``depth`` comparisons, and decides for the action 0.
        looks_at: names of the entries of an observation that the tree compares.
        decision_seconds: seconds of one decision, measured when the agent is made, with the deepest tree, and then saved
            with it.

    Raises:
        ValueError: a teacher that does not learn from traces, or one for whose plans the control is not made.
    """

    class Settings(SeededSettings):
        teacher: str = Field(
            "hindsight",
            description="agent that learns from traces and is trained first, or the folder of a finished run of the "
            "same problem",
        )
        depth: Annotated[int, Ge(1), Le(32)] = Field(6, description="most comparisons of a decision")
        decisions: Count = Field(16384, description="decisions that the teacher labels in each round")
        rounds: Natural = Field(
            3, description="rounds in which the tree so far decides, after one in which the teacher does"
        )

    settings: Settings
    problems = TracedAgent.problems
    learns_from = "trace"

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        name, known = self.settings.teacher, agents.AGENTS
        if name in known:
            if not issubclass(known[name], TracedAgent):
                fit = ", ".join(sorted(other for other, kind in known.items() if issubclass(kind, TracedAgent)))
                raise ValueError(f"teacher is {name!r}; expected one of {fit}, or the folder of a finished run")
            weighed(self.control)
        self._plant(Nodes.path(self.settings.depth))
        self.decision_seconds = self.measure()

    def _plant(self, nodes: Nodes) -> None:
        """Decide by these nodes from now on."""
        self.nodes, compared = nodes, set(nodes.feature) - {LEAF}
        self.looks_at = [
            name for name, place in self.control.slices.items() if compared & set(range(place.start, place.stop))
        ]

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """Return the action for one observation; nothing is drawn."""
        return self.nodes.decide(observation), state

    def learn(self, total_timesteps: int, env: gym.Env | ReplayVectorEnv, run: Run | None = None) -> Self:
        """Train the teacher, unless it is a finished run, and distil it. Learning takes seconds and starts over if it was
        killed: it writes no checkpoints.

        Args:
            total_timesteps: ignored; ``decisions`` and ``rounds`` set how much is learned from.
            env: an environment that replays a trace.
            run: gets ``log.jsonl`` and TensorBoard events.

        Raises:
            ValueError: an environment without a trace, or a teacher that cannot be read or is of another problem.
        """
        from sklearn.tree import DecisionTreeClassifier  # imported here, because it takes a second

        vector = replay_of(env)
        teacher = self._teacher(vector)
        unread = np.ones(len(self.control.observation_space.low), bool)
        for name in self.control.slices if teacher.looks_at is None else teacher.looks_at:
            unread[self.control.slices[name]] = False
        found: list[Labelled] = []
        shown = {"agent": "decision-tree", "teacher": self.settings.teacher, "seed": self.settings.seed}
        journal = Journal((run or Run()).folder, 0, 0, shown, "decision_tree", "agreement")
        for number in range(self.settings.rounds + 1):
            found.append(self._labelled(vector, teacher, self if number else teacher, self.settings.seed + number))
            seen, action, weight = map(np.concatenate, zip(*found, strict=True))
            seen[:, unread] = 0
            tree = DecisionTreeClassifier(max_depth=self.settings.depth, random_state=self.settings.seed)
            self._plant(Nodes.fitted(tree.fit(seen, action, sample_weight=weight)))
            agreement = float((tree.predict(seen) == action).mean())
            journal.write("log", {"step": len(action), "round": number, "agreement": agreement})
        journal.close()
        return self

    def _teacher(self, env: ReplayVectorEnv) -> Agent:
        """Return the trained teacher, under the prices of the environments."""
        name = self.settings.teacher
        if name in agents.AGENTS:
            teacher: Agent = agents.AGENTS[name](control=self.control, seed=self.settings.seed).learn(0, env)
        else:
            control, teacher = agents.load(name)
            self.control.check_layout(control, f"the teacher {name}")
        if isinstance(teacher, HindsightAgent):
            teacher.price(env.cost_tables[0]).nodes = None  # its network teaches
        return teacher

    def _labelled(self, env: ReplayVectorEnv, teacher: Agent, actor: Agent, seed: int) -> Labelled:
        """Return the decisions of one round, or a few more, which ``actor`` decides and ``teacher`` labels."""
        observations, _ = env.reset(seed=seed)
        starts, state, found = np.ones(env.num_envs, bool), None, list[Labelled]()
        while len(found) * env.num_envs < self.settings.decisions:
            actions, state = teacher.predict(observations, state, starts, deterministic=True)
            found.append(Labelled(observations, actions, stakes(teacher, observations)))
            if actor is not teacher:
                actions, _ = actor.predict(observations)
            observations, _, starts, _, _ = env.step(actions)
        return Labelled(*map(np.concatenate, zip(*found, strict=True)))

    def rules(self) -> str:
        """Return the tree as text: nested conditions on numbers of the observation, by entry and index, and actions."""
        names = [f"{name}[{i}]" for name, place in self.control.slices.items() for i in range(place.stop - place.start)]

        def lines(node: int, margin: str) -> Iterator[str]:
            if self.nodes.feature[node] == LEAF:
                yield f"{margin}action {self.nodes.action[node]}"
                return
            yield f"{margin}if {names[self.nodes.feature[node]]} <= {self.nodes.threshold[node]:.6g}:"
            yield from lines(self.nodes.left[node], margin + "    ")
            yield f"{margin}else:"
            yield from lines(self.nodes.right[node], margin + "    ")

        return "\n".join(lines(0, ""))

    def measure(self) -> float:
        """Return the median seconds of a decision."""
        space = self.control.observation_space
        seen = iter(np.random.default_rng(0).random((REPEATS, *(space.shape or (0,))), np.float32))
        return cold_seconds(lambda: self.predict(next(seen)))

    @property
    def priced_seconds(self) -> float:
        """Seconds of the longest decision under a cost table."""
        return priced(comparisons=self.settings.depth)

    def save(self, folder: str | Path) -> None:
        """Write the tree."""
        tensors = {
            name: torch.tensor(column, dtype=KINDS[name])
            for name, column in zip(Nodes._fields, self.nodes, strict=True)
        }
        noted = {"decision_seconds": repr(self.decision_seconds), "observation": layout(self.control)}
        write_weights(Path(folder) / FILE, tensors, **noted)

    def load(self, folder: str | Path) -> None:
        """Read the tree that ``save`` wrote.

        Raises:
            ValueError: there is none, it is damaged, or it is that of another control.
        """
        path, remedy = Path(folder) / FILE, "delete it to train again"
        tensors, metadata = read_weights(path, "the policy in", remedy)
        self.decision_seconds = number_of(metadata, "decision_seconds", path, remedy)
        seen = metadata.get("observation")
        try:
            if seen != layout(self.control):
                raise ValueError(f"its tree reads {seen}, but here {self.control.env_id} has {layout(self.control)}")
            numbers, actions = len(self.control.observation_space.low), int(self.control.action_space.n)
            self._plant(Nodes.checked(tensors, numbers, actions))
        except ValueError as error:
            raise ValueError(f"cannot read the policy in {path}: {error}; {remedy}") from None


def stakes(teacher: Agent, observations: np.ndarray) -> np.ndarray:
    """Return by how much the best action is worth more than the second best, ``[n]``; 1 where the teacher does not value
    actions."""
    return teacher.stakes(observations) if isinstance(teacher, HindsightAgent) else np.ones(len(observations))
