"""Exact policy gradient: a trace knows what every action leads to, so the expectation over actions is summed, not
sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spec_envs.agents.base import checked_control
from spec_envs.agents.traced.base import TracedAgent
from spec_envs.agents.traced.lessons import Lessons
from spec_envs.controls.base import Control
from spec_envs.vector.env import ReplayVectorEnv

MEMORY = 0.98  # of the running sums of tokens and seconds, per step


class ExactPGAgent(TracedAgent):
    """Trains a softmax policy by the exact policy gradient of a cycle's expected tokens less the worth of its seconds:
    ∇ Σ P(plan) · (cost · tokens − λ · seconds), the sum taken over all plans of the cycle. ``cost`` is what a
    token costs at that place of the text, in units of the mean, so that what is summed are the seconds that are saved.

    P is the product of the policy's choices that lead to a plan. No action is drawn, so the gradient has no variance
    but that of the cycles in a batch. λ, the worth of a second, is ΣE[cost · N] / ΣE[T] so far (Dinkelbach 1967). The
    policy is valid for the cost table that it was trained under. It is policy gradient (Williams 1992) where the
    expectation can be summed instead of sampled.

    Args:
        control, hyperparameters: those of ``TracedAgent``.
    """

    def __init__(self, control: Control, **hyperparameters: Any):
        choices = int(checked_control(control, type(self).__name__).action_space.n)
        super().__init__(control, choices, (nn.Tanh, lambda x: np.tanh(x, out=x)), **hyperparameters)
        if self.plans.drafts is not None:
            with torch.no_grad():  # as likely to draft as to stop, else hardly any gradient comes from deep plans
                self.last.bias[self.plans.drafts] += float(np.log(choices - 1))
            self._unpack()
        self.decision_seconds = self.measure()
        self.tokens = self.seconds = 0.0

    def actions(self, observations: np.ndarray) -> np.ndarray:
        """Return the most probable action ``[n]`` for each of the observations ``[n, …]``."""
        actions: np.ndarray = self.outputs(observations).argmax(1)
        return actions

    def fit(self, lessons: Lessons, new: Lessons, env: ReplayVectorEnv) -> Iterator[float]:
        """Run one round of policy-gradient ascent; yield the loss of each step."""
        table = env.cost_tables[0]
        seen, gained = torch.from_numpy(lessons.seen), torch.from_numpy(lessons.worth)
        unread, late = self.plans.unread(lessons.seen[:, 0]), self.plans.catching_up(table)
        seconds = lessons.seconds(self.plans.prices(table)) + late[np.arange(len(late)), unread]
        spent = torch.from_numpy(seconds.astype(np.float32))
        if not self.seconds:
            self.tokens, self.seconds = 1.0, table.seconds("verify", 1)
        optimizer, schedule = self.optimizer()
        for _ in range(self.settings.steps):
            batch = torch.randint(len(seen), (self.settings.batch_size,))
            chances = self._chances(seen[batch])
            tokens, time = (chances * gained[batch]).sum(1).mean(), (chances * spent[batch]).sum(1).mean()
            self.tokens = MEMORY * self.tokens + (1 - MEMORY) * tokens.item()
            self.seconds = MEMORY * self.seconds + (1 - MEMORY) * time.item()
            loss = self.tokens / self.seconds * time - tokens
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            yield loss.item()
        self._unpack()

    def _chances(self, seen: Tensor) -> Tensor:
        """Return the probability ``[n, plans]`` that the policy follows each plan, from what is seen at every level
        ``[n, levels, …]``."""
        plans = self.plans
        chances: Tensor = self.network(seen[..., : self.width]).softmax(-1)
        stopping = torch.from_numpy(plans.ends)
        if plans.drafts is None:
            return chances[:, 0, stopping]
        on = chances[:, :, plans.drafts]
        undecided = torch.arange(plans.levels) < plans.first  # levels that are always drafted
        on = torch.where(undecided, 1.0, on)
        reached = torch.cat([torch.ones(len(on), 1), on.cumprod(1)[:, :-1]], 1)
        stops = torch.where(undecided[:, None], 0.0, chances)
        end = stops[:, -1:]  # where drafting ends the cycle: with the largest budget, or with all there is
        if chances.shape[2] == 2:
            end = torch.ones_like(end)
        else:
            end = torch.cat([end[..., :-1], end[..., -1:] + end[..., plans.drafts, None]], -1)
        stops = torch.cat([stops[:, :-1], end], 1)
        sizes = torch.from_numpy(plans.sizes)
        return reached[:, sizes] * stops[:, sizes, stopping]
