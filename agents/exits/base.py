"""An agent that drafts by an early exit's own projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from spec_envs.agents.base import Agent
from spec_envs.agents.settings import SeededSettings
from spec_envs.agents.timing import cold_seconds, priced
from spec_envs.controls.base import Control
from spec_envs.decoding.drafters.early_exit import Projection
from spec_envs.decoding.exits.adapter import ExitAdapter, default_rank
from spec_envs.decoding.exits.files import load_exit, save_exit
from spec_envs.decoding.sampling import inverse_cdf
from spec_envs.decoding.weights.checkpoints import load_target, resolve_device, resolve_dtype


class ExitAgent(Agent):
    """Drafts the tokens that an exit's projection predicts from the exit's state.

    Args:
        control: of ``SpecDVI-v0``.

    Attributes:
        exit: the settings of the problem's exit.
        adapter: the exit with its trained weights.
        block: log-probabilities of the tokens drafted for the block under way, which whoever learns from them empties;
            None where nobody needs them.

    Raises:
        ValueError: another problem.
    """

    Settings: ClassVar[type[SeededSettings]] = SeededSettings
    settings: SeededSettings
    problems = ("dvi",)
    remembers = ("block",)

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        if control.exit is None:
            raise ValueError(
                f"{type(self).__name__} improves an early exit: {control.env_id} drafts with another model; take "
                "SpecDVI-v0"
            )
        self.exit = control.exit
        self.rng = np.random.default_rng(self.settings.seed)
        self.block: list[float] | None = None
        self._adapter: ExitAdapter | None = None
        self._deployed: Projection | None = None

    @property
    def adapter(self) -> ExitAdapter:
        if self._adapter is None:
            raise ValueError(f"{type(self).__name__} has no exit yet; load a run, or let it learn in an environment")
        return self._adapter

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """Return the token to draft.

        With ``deterministic`` it is the most probable token of the projection's shortlist. Without it, as during
        learning, it is drawn from the whole vocabulary at ``draft_temperature``; at 0 it is the most probable token.
        """
        if deterministic:
            if self._deployed is None:
                self._deployed = Projection(self.adapter)
            with torch.inference_mode():
                best = int(self._deployed.head(self._hidden(observation)).argmax())
            return best if self._deployed.ids is None else int(self._deployed.ids[best]), state
        token, log_probability = self._drawn(observation)
        if self.block is not None:
            self.block.append(log_probability)
        return token, state

    def _hidden(self, observation: np.ndarray) -> Tensor:
        """Return the projection's input ``[1, hidden]``, in the target's dtype."""
        target = self.adapter.target
        hidden = torch.from_numpy(np.asarray(observation, np.float32)[self.control.slices["hidden"]])[None]
        return hidden.to(target.device, target.precision.hidden)

    @torch.no_grad()
    def _drawn(self, observation: np.ndarray) -> tuple[int, float]:
        """Return a token drafted while learning, and its log-probability."""
        logits = self.adapter.logits(self._hidden(observation))[0]
        temperature = self.exit.draft_temperature
        log_probabilities = (logits / (temperature or 1.0)).log_softmax(-1)
        if temperature == 0:
            token = int(log_probabilities.argmax())
        else:
            token = inverse_cdf(log_probabilities.double().exp().cpu().numpy(), self.rng.random())
        return token, float(log_probabilities[token])

    def save(self, folder: str | Path) -> None:
        """Write the exit, as it serves as ``drafter=``."""
        save_exit(self.adapter, Path(folder))

    def load(self, folder: str | Path) -> None:
        """Read an exit.

        Raises:
            ValueError: none there, or one of another target, layer or kind.
        """
        device = resolve_device(self.exit.device)
        target = load_target(self.exit.target, device, resolve_dtype(self.exit.dtype, device, [self.exit.target]))
        adapter = load_exit(Path(folder), target, self.exit.target)
        self._check(adapter, str(folder))
        self._adapter, self._deployed = adapter, None
        self.decision_seconds = self.measure()

    def _check(self, adapter: ExitAdapter, place: str) -> None:
        """Refuse another exit than that of the agent's problem."""
        point = self.exit
        found = (adapter.exit_layer, adapter.kind, adapter.settings.rank)
        wanted = (point.exit_layer, point.adapter, point.rank or default_rank(point.adapter))
        if found != wanted:
            raise ValueError(f"{place} has exit_layer, adapter and rank {found}, this agent's problem has {wanted}")

    @property
    def priced_seconds(self) -> float:
        """Seconds of a decision under a cost table."""
        shape = self.adapter.target.shape
        return priced(shape.vocab * shape.hidden, in_torch=1)

    def measure(self) -> float:
        """Return the median seconds of a decision."""
        blank = np.ones(self.control.observation_space.shape or 0, np.float32)
        return cold_seconds(lambda: self.predict(blank, deterministic=True))
