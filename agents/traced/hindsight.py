"""Hindsight: learn the outcome of every plan, then weigh it against its cost on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Self

import numpy as np
import torch
from annotated_types import Ge, Le
from pydantic import Field
from torch import nn
from torch.nn.functional import poisson_nll_loss

from spec_envs.agents.base import checked_control
from spec_envs.agents.timing import priced
from spec_envs.agents.traced.base import TracedAgent, weighed
from spec_envs.agents.traced.lessons import Lessons
from spec_envs.agents.traced.nodes import Nodes
from spec_envs.agents.traced.outcomes import outcomes_of
from spec_envs.controls.base import Control
from spec_envs.controls.plans import Prices
from spec_envs.decoding.clock import CostTable
from spec_envs.vector.env import ReplayVectorEnv

KEPT = 512  # cycles that are kept to find the pace of a cost table by, and to distil the decisions from
LEAST = 1e-6  # weight of a decision on which nothing depends, so that there is a tree where none matters
DINKELBACH = 12  # iterations, of which a few are enough
UNIT = CostTable("a verification of one row", {1: 1.0}, {1: 0.1})


class HindsightAgent(TracedAgent):
    """Predicts how many tokens A would be accepted under each plan that is still open (deeper trees, other budgets, longer
    chains) and what a token costs at this place of the text, c, in units of the mean; and follows the plan with the
    most cA − λT, T being its remaining seconds under a cost table.

    λ is the throughput that the policy itself reaches, with tokens weighed by c. It is found by Dinkelbach's iteration
    (1967) on cycles that are kept with the weights: another table needs another λ, not another training.
    ``price(table)`` sets it.

    A trace holds what every action would have led to, so nothing is explored: the network is fitted to all plans of
    every cycle at once, by the likelihood of their outcomes. While a cycle continues the agent
    predicts again, so that it stops where its first plan turns out too hopeful.

    It decides by a decision tree that imitates its network on the cycles that are kept, where a decision weighs as much
    as the best action is worth more than the second best (VIPER, Bastani et al. 2018, arXiv 1805.08328, has the worst in
    place of the second best). The tree takes a fraction of the network's time, and is fitted anew under every cost
    table; with ``comparisons=0`` the network decides.

    Args:
        control, hyperparameters: those of ``TracedAgent``.
    """

    class Settings(TracedAgent.Settings):
        comparisons: Annotated[int, Ge(0), Le(32)] = Field(
            6, description="most comparisons of a decision by a tree that imitates the network; 0: the network decides"
        )

    settings: Settings
    needs_costs = True

    def __init__(self, control: Control, **hyperparameters: Any):
        self.outcomes = outcomes_of(weighed(checked_control(control, type(self).__name__)))
        super().__init__(
            control, 1 + self.outcomes.outputs, (nn.ReLU, lambda x: np.maximum(x, 0, out=x)), **hyperparameters
        )
        self.kept: Lessons | None = None
        self.beside = (0.0, 0.0)  # ``caught`` and ``verified`` of the lessons
        self.table: CostTable | None = UNIT
        self.nodes = Nodes.path(self.settings.comparisons) if self.settings.comparisons else None
        self.price(UNIT)
        self.decision_seconds = self.measure()
        self.table = None

    def describe(self, block: int | None, copied: int) -> None:
        super().describe(block, copied)
        self.outcomes = outcomes_of(self.plans)

    def price(self, table: CostTable) -> Self:
        """Weigh plans under another cost table from now on."""
        self.table, self.catching_up = table, self.plans.catching_up(table)
        self.known.clear()
        prices = self.plans.prices(table)
        self._set_pace(1 / table.seconds("verify", 1), prices)
        if self.kept is None:
            return self
        seconds = self.kept.seconds(prices) + self.plans.before(table) + self._late(self.kept.seen[:, 0])
        for _ in range(DINKELBACH):
            chosen = np.arange(len(seconds)), self._chosen(self.kept.seen)
            self._set_pace(self.kept.worth[chosen].sum() / seconds[chosen].sum(), prices)
        if self.nodes:
            self.nodes = self._distilled(self.kept.seen)
        return self

    def _distilled(self, seen: np.ndarray) -> Nodes:
        """Return a tree that decides like the network in cycles ``[n, levels, …]``, as far as it drafts in them."""
        from sklearn.tree import DecisionTreeClassifier  # imported here, because it takes a second

        level, size = np.arange(seen.shape[1]), self.plans.sizes[self._chosen(seen)][:, None]
        met = seen[(self.plans.first <= level) & (level <= size)] if self.plans.stepwise else seen[:, 0]
        tree = DecisionTreeClassifier(max_depth=self.settings.comparisons, random_state=self.settings.seed)
        return Nodes.fitted(tree.fit(met, self.actions(met), sample_weight=self.stakes(met)))

    def _set_pace(self, pace: float, prices: Prices) -> None:
        """Weigh seconds by another λ."""
        self.pace = pace
        self.outcomes.price(pace, prices, *self.beside)

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """Return the action for one observation, under the control's cost table unless ``price`` gave another.

        Raises:
            ValueError: there is no cost table.
        """
        if self.table is None:
            if self.control.costs is None:
                raise ValueError(
                    "hindsight weighs tokens against seconds: set the control's costs to a CostTable, or call "
                    "price(table)"
                )
            self.price(self.control.costs)
        if self.nodes:
            return self.nodes.decide(observation), state
        return super().decide(observation, state, start, deterministic)

    def actions(self, observations: np.ndarray) -> np.ndarray:
        """Return the actions ``[n]`` that follow the plans which are worth most."""
        level = self.plans.level(observations)
        return self.plans.actions(level, self._best(observations, level))

    def values(self, observations: np.ndarray) -> np.ndarray:
        """Return the worth of each action in tokens ``[n, actions]``, up to a number that all actions of an observation
        have in common: that of the best plan that it follows, and −inf where it follows none that is open."""
        level = self.plans.level(observations)
        worth = self._worth(observations, level)
        follows = self.plans.actions(level[:, None], np.arange(worth.shape[1]))
        values = np.full((len(worth), int(self.control.action_space.n)), -np.inf)
        np.maximum.at(values, (np.arange(len(worth))[:, None], follows), worth)
        return values

    def stakes(self, observations: np.ndarray) -> np.ndarray:
        """Return by how much the best action is worth more than the second best, ``[n]``."""
        best = np.sort(self.values(observations), 1)[:, -2:]
        found: np.ndarray = LEAST + np.nan_to_num(best[:, -1] - best[:, 0], posinf=0.0)  # infinite: only one is open
        return found

    @property
    def priced_seconds(self) -> float:
        """Seconds of the longest decision by the tree, or else of one by the network, under a cost table."""
        return priced(comparisons=self.settings.comparisons) if self.nodes else super().priced_seconds

    def _best(self, observations: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Return the plan ``[n]`` with the most cA − λT among those that are open."""
        best: np.ndarray = self._worth(observations, level).argmax(1)
        return best

    def _worth(self, observations: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Return cA − λT of every plan ``[n, plans]``; see ``Outcomes.worth``."""
        predicted = self.outputs(observations)
        worth: np.ndarray = self.outcomes.worth(predicted[:, 1:], level, np.exp(predicted[:, :1]))
        return worth - self.pace * self._late(observations)

    def _late(self, observations: np.ndarray) -> np.ndarray:
        """Return the seconds of reading what the drafter of each plan has not read, ``[n, plans]`` or ``[n, 1]``."""
        late: np.ndarray = self.catching_up[np.arange(len(self.catching_up)), self.plans.unread(observations)]
        return late

    def _chosen(self, seen: np.ndarray) -> np.ndarray:
        """Return the plan ``[n]`` with which each cycle ends, from what is seen at every level ``[n, levels, …]``."""
        n, levels = seen.shape[:2]
        level = np.broadcast_to(np.arange(levels), (n, levels))
        plan = self._best(seen.reshape(n * levels, -1), level.ravel()).reshape(n, levels)
        if not self.plans.stepwise:
            return plan[:, 0]
        ends = (self.plans.sizes[plan] <= level) & (level >= self.plans.first)
        chosen: np.ndarray = plan[np.arange(n), ends.argmax(1)]
        return chosen

    def fit(self, lessons: Lessons, new: Lessons, env: ReplayVectorEnv) -> Iterator[float]:
        """Fit the network by cross-entropy over all open plans of all levels, weighed by what a token costs, and to that
        cost by Poisson regression; yield the loss of each step."""
        seen = torch.from_numpy(lessons.seen[..., : self.width])
        accepted, forwards, cost = map(torch.from_numpy, (lessons.accepted, lessons.forwards, lessons.cost))
        optimizer, schedule = self.optimizer()
        shallow = 1 / (1.0 + torch.arange(seen.shape[1]))[:, None]  # as in ``Outcomes.loss``
        for _ in range(self.settings.steps):
            batch = torch.randint(len(seen), (self.settings.batch_size,))
            predicted, costs = self.network(seen[batch]), cost[batch, None, None]
            loss = self.outcomes.loss(predicted[..., 1:], accepted[batch], forwards[batch], costs)
            errors = poisson_nll_loss(predicted[..., :1], costs.expand(-1, predicted.shape[1], -1), reduction="none")
            loss = loss + (shallow * errors).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield loss.item()
        self._unpack()
        some = np.random.default_rng(self.settings.seed).permutation(len(new.begun))[:KEPT]
        kept = new._replace(seen=new.seen[..., : self.width], begun=np.zeros(len(new.begun)))
        self.kept, self.beside = Lessons(*(column[some] for column in kept)), (lessons.caught, lessons.verified)
        self.price(env.cost_tables[0])

    def state(self) -> dict[str, np.ndarray]:
        """Return the cycles that the pace is found by, and how the drafter drafts where it drafts blocks or copies first.

        Raises:
            ValueError: nothing was learned.
        """
        if self.kept is None:
            raise ValueError("there is nothing to save: the agent has not learned")
        block = {} if self.plans.block is None else {"block": np.array(self.plans.block)}
        copied = {"copied": np.array(self.plans.copied)} if self.plans.copied else {}
        return {
            **block,
            **copied,
            "seen": self.kept.seen.astype(np.float16),
            "accepted": self.kept.accepted.astype(np.int16),
            "forwards": self.kept.forwards.astype(np.int16),
            "beside": self.kept.beside.astype(np.int16),
            "further": self.kept.further.astype(np.int16),
            "cost": self.kept.cost.astype(np.float16),
            "alternatives": np.array(self.beside, np.float32),
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Restore what ``state`` returned."""
        self.describe(int(state["block"]) if "block" in state else None, int(state.get("copied", 0)))
        kept = {name: state[name].astype(np.float32) for name in Lessons._fields if name in state}
        self.kept, self.table = Lessons(**kept, begun=np.zeros(len(kept["seen"]))), None
        caught, verified = state["alternatives"].tolist()
        self.beside = caught, verified
