"""SpecDec++: a learned head predicts acceptance, and drafting stops where a rejection is likely."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from agents.rule import StopRule
from agents.timing import cold_seconds
from spec_envs.controls.base import Control
from spec_envs.files import write_bytes


class SpecDecPlusAgent(StopRule):
    """Stops where the chance that the chain holds a rejection, 1 − Πa, is above a threshold, a being what a learned head
    says of each token's acceptance (Huang et al. 2024, SpecDec++, arXiv 2405.19715). The published head reads the draft
    model's hidden state; this one reads the observation.

    ``learn`` drafts chains of every length up to the longest, notes which tokens were accepted, and fits the head by
    cross-entropy in which a rejection weighs more; what does best on the last fifth of what was noted is kept.

    Args:
        threshold: of the chance of a rejection; 0.7 is the published one.
        rejection_weight: 6 is the published one.
        hidden: units of the head's one layer.
        epochs: most passes over what was noted.
        copy_threshold: see ``StopRule``.
    """

    remembers = ("alive",)
    looks_at: tuple[str, ...] = ("drafted", "probability", "entropy", "path", "free")

    def __init__(
        self,
        control: Control,
        threshold: float = 0.7,
        rejection_weight: float = 6.0,
        hidden: int = 32,
        epochs: int = 200,
        seed: int = 0,
        copy_threshold: float = 0.1,
    ):
        super().__init__(control, copy_threshold)
        self.looks_at = tuple(control.slices)  # whatever else there is
        self.threshold, self.rejection_weight, self.epochs, self.seed = threshold, rejection_weight, epochs, seed
        torch.manual_seed(seed)
        assert control.observation_space.shape is not None
        width = control.observation_space.shape[0]
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.alive = 1.0
        self._unpack()

    def begin(self, observation: np.ndarray) -> None:
        self.alive = 1.0

    def stops(self, observation: np.ndarray) -> bool:
        self.alive *= self.acceptance(observation)
        return 1 - self.alive > self.threshold

    def acceptance(self, observation: np.ndarray) -> float:
        """The head's chance that the chain's last token is accepted, those before it being accepted."""
        hidden = self.weights[0] @ observation + self.weights[1]
        logit = self.weights[2] @ (hidden / (1 + np.exp(-hidden))) + self.weights[3]
        return float(1 / (1 + np.exp(-logit[0])))

    def learn(self, total_timesteps: int, env: gym.Env | None = None) -> Self:
        """Note ``total_timesteps`` decisions in ``env`` and fit the head."""
        if env is None:
            raise ValueError("SpecDec++ learns from an environment; pass env=")
        seen, accepted = self._note(total_timesteps, env)
        if not len(seen):
            raise ValueError(f"no draft was judged in {total_timesteps} steps; expected more steps, or another drafter")
        torch.manual_seed(self.seed)
        weight = torch.where(accepted > 0, 1.0, self.rejection_weight)
        fitted = slice(max(1, len(seen) * 4 // 5))
        held_out = slice(fitted.stop, None) if fitted.stop < len(seen) else fitted
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=5e-3, weight_decay=1e-3)

        def loss(rows: slice) -> torch.Tensor:
            logits = self.head(seen[rows])[:, 0]
            return nn.functional.binary_cross_entropy_with_logits(logits, accepted[rows], weight[rows])

        best, least = self.head.state_dict(), float("inf")
        for _ in range(self.epochs):
            optimizer.zero_grad()
            loss(fitted).backward()
            optimizer.step()
            with torch.no_grad():
                after = loss(held_out).item()
            if after < least:
                best, least = copy.deepcopy(self.head.state_dict()), after
        self.head.load_state_dict(best)
        self._unpack()
        return self

    def _note(self, total_timesteps: int, env: gym.Env) -> tuple[torch.Tensor, torch.Tensor]:
        """Observations behind drafted tokens up to the first refused one, and whether each was accepted."""
        rng = np.random.default_rng(self.seed)
        seen: list[np.ndarray] = []
        labels: list[float] = []
        chain: list[np.ndarray] = []
        length = int(rng.integers(1, self.k_max + 1))
        observation, _ = env.reset(seed=self.seed)
        for _ in tqdm(range(total_timesteps), desc="noting what is accepted", unit="step"):
            observation, _, terminated, truncated, info = env.step(int(len(chain) < length))
            if not info["emitted"]:
                chain.append(observation)
                continue
            refused = info["accepted"] < len(chain) and not (terminated or truncated)
            seen += chain[: info["accepted"] + refused]
            labels += [1.0] * min(len(chain), info["accepted"]) + [0.0] * refused
            chain, length = [], int(rng.integers(1, self.k_max + 1))
            if terminated or truncated:
                observation, _ = env.reset()
        return torch.from_numpy(np.array(seen)), torch.tensor(labels)

    def _unpack(self) -> None:
        """The head as arrays: a decision by NumPy costs a tenth of one by torch. Its time is charged per decision."""
        self.weights = [parameter.detach().numpy().copy() for parameter in self.head.parameters()]
        blank = np.zeros(self.weights[0].shape[1], np.float32)
        self.decision_seconds = cold_seconds(lambda: self.acceptance(blank))

    def save(self, folder: Path) -> None:
        write_bytes(folder / "policy.safetensors", save(self.head.state_dict()))

    def load(self, folder: Path) -> None:
        """Read the head.

        Raises:
            ValueError: none there, or one of another shape.
        """
        try:
            self.head.load_state_dict(load_file(folder / "policy.safetensors"))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot read the policy in {folder}: {str(error).splitlines()[0]}") from None
        self._unpack()

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {"threshold": trial.suggest_float("threshold", 0.2, 0.95), **StopRule.space(trial)}
