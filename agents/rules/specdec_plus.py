"""SpecDec++: a learned head predicts acceptance, and drafting stops where a rejection is likely."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field
from torch import nn
from tqdm import tqdm

from spec_envs.agents.resuming import Progress
from spec_envs.agents.rules.base import StopRule
from spec_envs.agents.run import Run
from spec_envs.agents.settings import Amount, Count, Natural, SeededSettings, Share
from spec_envs.agents.timing import cold_seconds, priced_network
from spec_envs.controls.base import Control
from spec_envs.sealed import first_line, read_weights, write_weights


class SpecDecPlusAgent(StopRule):
    """Stops drafting where the chance that the chain holds a rejection, 1 − Πᵢ aᵢ, is above a threshold; aᵢ is the
    acceptance of token i that a learned head predicts (Huang et al. 2024, SpecDec++, arXiv 2405.19715). The published
    head reads the draft model's hidden state; this one reads the observation.

    ``learn`` drafts chains of every length up to the longest, records which tokens were accepted, and fits the head by
    cross-entropy in which a rejection weighs more; the epoch with the least loss on the last fifth of the records is
    kept.
    """

    class Settings(StopRule.Settings, SeededSettings):
        threshold: Share = Field(
            0.7, description="largest chance of a rejection at which drafting continues; 0.7 is the published one"
        )
        rejection_weight: Amount = Field(6.0, description="weight of a rejection in the loss; 6 is the published one")
        hidden: Count = Field(32, description="units of the head's one layer")
        epochs: Natural = Field(200, description="largest number of passes over the records")

    settings: Settings
    learns_from = "cycles"
    remembers = ("alive",)
    looks_at: tuple[str, ...] = ("drafted", "probability", "entropy", "path", "free")

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.looks_at = tuple(control.slices)  # whatever else there is
        torch.manual_seed(self.settings.seed)
        hidden = self.settings.hidden
        self.head = nn.Sequential(
            nn.Linear(len(control.observation_space.low), hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )
        self.alive = 1.0
        self._unpack()
        self.decision_seconds = self.measure()

    def begin(self, observation: np.ndarray) -> None:
        self.alive = 1.0

    def stops(self, observation: np.ndarray) -> bool:
        self.alive *= self.acceptance(observation)
        return 1 - self.alive > self.settings.threshold

    def acceptance(self, observation: np.ndarray) -> float:
        """Return the head's chance that the chain's last token is accepted, those before it being accepted."""
        hidden = self.weights[0] @ observation + self.weights[1]
        logit = self.weights[2] @ (hidden / (1 + np.exp(-hidden))) + self.weights[3]
        return float(1 / (1 + np.exp(-logit[0])))

    @property
    def priced_seconds(self) -> float:
        return priced_network(self.head)

    def measure(self) -> float:
        blank = np.zeros(self.weights[0].shape[1], np.float32)
        return cold_seconds(lambda: self.acceptance(blank))

    def learn(self, total_timesteps: int, env: gym.Env, run: Run | None = None) -> Self:
        """Record ``total_timesteps`` decisions in ``env`` and fit the head, continuing from the run's checkpoint.

        Raises:
            ValueError: no draft was verified in so many steps.
        """
        progress = Progress(run or Run(), np.random.default_rng(self.settings.seed), env)
        progress.open_journal("specdec", "accept_rate", {"agent": "specdec++", "seed": self.settings.seed})
        seen, accepted = self._recorded(total_timesteps, env, progress)
        if not len(seen):
            raise ValueError(
                f"no draft was verified in {total_timesteps} steps; expected more steps, or another drafter"
            )
        torch.manual_seed(self.settings.seed)
        weight = torch.where(accepted > 0, 1.0, self.settings.rejection_weight)
        fitted = slice(max(1, len(seen) * 4 // 5))
        held_out = slice(fitted.stop, None) if fitted.stop < len(seen) else fitted
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=5e-3, weight_decay=1e-3)

        def loss(rows: slice) -> torch.Tensor:
            logits = self.head(seen[rows])[:, 0]
            return nn.functional.binary_cross_entropy_with_logits(logits, accepted[rows], weight[rows])

        best, least = self.head.state_dict(), float("inf")
        for epoch in range(1, self.settings.epochs + 1):
            optimizer.zero_grad()
            before = loss(fitted)
            before.backward()
            optimizer.step()
            with torch.no_grad():
                after = loss(held_out).item()
            if after < least:
                best, least = copy.deepcopy(self.head.state_dict()), after
            losses = {"epoch": epoch, "loss": before.item(), "loss_held_out": after}
            progress.journal.write("log", {"step": progress.steps + epoch, "texts": progress.texts + 1, **losses})
        progress.journal.close()
        self.head.load_state_dict(best)
        self._unpack()
        return self

    def _recorded(self, total_timesteps: int, env: gym.Env, progress: Progress) -> tuple[torch.Tensor, torch.Tensor]:
        """Return observations after drafted tokens up to the first rejected one, ``[n, size]``, and whether each was
        accepted, ``[n]``."""
        saved = progress.state or {"seen": torch.zeros(0, self.weights[0].shape[1]), "labels": torch.zeros(0)}
        seen: list[np.ndarray] = list(saved["seen"].numpy())
        labels: list[float] = saved["labels"].tolist()
        chain: list[np.ndarray] = []
        before, length = len(labels), self._length(progress)
        observation = progress.begin(self.settings.seed)
        bar = tqdm(
            total=total_timesteps,
            initial=progress.steps,
            desc="recording acceptance",
            unit="step",
            disable=progress.quiet,
        )
        while progress.steps < total_timesteps:
            observation, _, terminated, truncated, info = env.step(int(len(chain) < length))
            progress.steps += 1
            bar.update()
            over = terminated or truncated
            if not info["emitted"]:
                chain.append(observation)
                continue
            of_chain = info["accepted"] - info["beside"]
            rejected = of_chain < len(chain) and not over
            seen += chain[: of_chain + rejected]
            labels += [1.0] * min(len(chain), of_chain) + [0.0] * rejected
            chain, length = [], self._length(progress)
            if over:
                progress.texts += 1
                new, before = labels[before:], len(labels)
                rate = sum(new) / len(new) if new else None
                progress.journal.write("log", {"step": progress.steps, "texts": progress.texts, "accept_rate": rate})
                if progress.due():
                    progress.save({"seen": torch.from_numpy(np.array(seen)), "labels": torch.tensor(labels)})
                observation, length = progress.begin(self.settings.seed), self._length(progress)
        bar.close()
        return torch.from_numpy(np.array(seen)), torch.tensor(labels)

    def _length(self, progress: Progress) -> int:
        """Return a random length for the next chain."""
        return int(progress.rng.integers(1, self.k_max + 1))

    def _unpack(self) -> None:
        """Keep the head as arrays, because a decision by NumPy costs a tenth of one by torch."""
        self.weights = [parameter.detach().numpy().copy() for parameter in self.head.parameters()]

    def save(self, folder: str | Path) -> None:
        write_weights(Path(folder) / "policy.safetensors", self.head.state_dict())

    def load(self, folder: str | Path) -> None:
        """Read the head.

        Raises:
            ValueError: the file is missing, damaged, or of a head of another shape.
        """
        path, remedy = Path(folder) / "policy.safetensors", "delete it to train again"
        tensors, _ = read_weights(path, "the policy in", remedy)
        try:
            self.head.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"cannot read the policy in {path}: {first_line(error)}; {remedy}") from None
        self._unpack()

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {"threshold": trial.suggest_float("threshold", 0.2, 0.95), **StopRule.space(trial)}
