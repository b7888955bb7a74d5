"""Double deep Q-learning, in Stable-Baselines3's DQN."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update
from torch.nn import functional

LOSSES: dict[str, Callable[..., torch.Tensor]] = {"mse": functional.mse_loss, "huber": functional.smooth_l1_loss}


def double_target(
    online: Callable[[torch.Tensor], torch.Tensor],
    target: Callable[[torch.Tensor], torch.Tensor],
    rewards: torch.Tensor,
    dones: torch.Tensor,
    next_observations: torch.Tensor,
    discount: float | torch.Tensor,
) -> torch.Tensor:
    """Return r + γ·(1 − done)·Q_target(s', argmax_a Q_online(s', a)): one network selects, the other evaluates, so that
    the maximum over noisy values is not overestimated (van Hasselt et al. 2016, arXiv 1509.06461, equation 4).

    Args:
        online, target: from observations ``[batch, width]`` to values ``[batch, actions]``.
        rewards, dones: ``[batch, 1]``.
        discount: γ, or one per transition ``[batch, 1]``.

    Returns:
        ``[batch, 1]``, without a gradient.
    """
    with torch.no_grad():
        selected = online(next_observations).argmax(dim=1, keepdim=True)
        evaluated = target(next_observations).gather(1, selected)
        return rewards + discount * (1 - dones) * evaluated


class DoubleDQN(DQN):
    """Stable-Baselines3's DQN with the double target, and with the exploration and target copies of the published top-k
    selector, whose settings are the defaults (its network, 256-256-256 with ReLU, is ``policy_kwargs``).

    Args:
        epsilon_decay: factor of ε at every gradient update, from ``exploration_initial_eps`` down to
            ``exploration_final_eps``; None is the linear schedule over ``exploration_fraction`` of the steps.
        target_update_updates: gradient updates between copies of the network into the target network; None copies every
            ``target_update_interval`` steps of the environment.
        loss: ``"mse"`` or ``"huber"``.
        max_grad_norm: of a clipped gradient; the published selector does not clip.

    The other arguments are those of ``stable_baselines3.DQN``.

    Raises:
        ValueError: one of the first three is out of its range.
    """

    def __init__(
        self,
        policy: str | type[Any],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 10_000,
        learning_starts: int = 64,
        batch_size: int = 64,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        n_steps: int = 1,
        epsilon_decay: float | None = 0.995,
        target_update_updates: int | None = 10,
        loss: str = "mse",
        target_update_interval: int = 10_000,
        exploration_fraction: float = 0.1,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.01,
        max_grad_norm: float = float("inf"),
        stats_window_size: int = 100,
        **base: Any,
    ):
        if epsilon_decay is not None and not 0 < epsilon_decay <= 1:
            raise ValueError(f"epsilon_decay is {epsilon_decay}; expected a factor above 0 up to 1, or null")
        if target_update_updates is not None and target_update_updates < 1:
            raise ValueError(f"target_update_updates is {target_update_updates}; expected 1 or more, or null")
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}")
        self.epsilon_decay, self.target_update_updates, self.loss = epsilon_decay, target_update_updates, loss
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            n_steps=n_steps,
            target_update_interval=sys.maxsize if target_update_updates else target_update_interval,
            exploration_fraction=exploration_fraction,
            exploration_initial_eps=exploration_initial_eps,
            exploration_final_eps=exploration_final_eps,
            max_grad_norm=max_grad_norm,
            stats_window_size=stats_window_size,
            **base,
        )

    @property
    def exploration_rate(self) -> float:
        """The exploration rate ε; with ``epsilon_decay`` a function of the updates so far, so that it continues where
        training does."""
        if self.epsilon_decay is None:
            return self._scheduled_rate
        decayed = self.exploration_initial_eps * self.epsilon_decay**self._n_updates
        return max(self.exploration_final_eps, decayed)

    @exploration_rate.setter
    def exploration_rate(self, rate: float) -> None:
        self._scheduled_rate = rate  # DQN sets the value of its linear schedule

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Make ``gradient_steps`` updates on batches of the replay buffer, as ``DQN.train`` but for target, loss and
        copies."""
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            discount = self.gamma if batch.discounts is None else batch.discounts
            wanted = double_target(
                self.q_net, self.q_net_target, batch.rewards, batch.dones, batch.next_observations, discount
            )
            values = self.q_net(batch.observations).gather(1, batch.actions.long())
            loss = LOSSES[self.loss](values, wanted)
            self.policy.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            self._n_updates += 1
            if self.target_update_updates and self._n_updates % self.target_update_updates == 0:
                polyak_update(self.q_net.parameters(), self.q_net_target.parameters(), self.tau)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", loss.item())
