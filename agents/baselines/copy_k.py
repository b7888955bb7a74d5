"""Two chain lengths: one where the first token is a copy, one where the draft model drafts it."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.base import checked_control
from spec_envs.agents.rules.base import Rule
from spec_envs.agents.settings import AgentSettings, Natural
from spec_envs.controls.base import Control
from spec_envs.decoding.drafters.lookup import LONGEST, SHORTEST


class CopyKAgent(Rule):
    """Drafts ``k_copied`` tokens where the first one would be copied out of the text, and ``k`` tokens where the draft
    model drafts it. Neither length is more than the environment's ``k_max``.

    A copy is free and more often right than a draft, so one length for both is a weak baseline of a drafter that copies
    (``lookup+…``, ``suffix+…``). The two best lengths on recorded texts are an arm of tables (``static by copies``).

    With ``decision="token"`` the environment shows whether the first token would be copied (``free``). With
    ``decision="cycle"`` it is taken for a copy if two or more of the text's last tokens match an earlier place
    (``match``), which is exact for ``lookup+…``.
    """

    class Settings(AgentSettings):
        k: Natural = Field(1, description="tokens of a chain whose first one the draft model drafts")
        k_copied: Natural = Field(6, description="tokens of a chain whose first one is copied")

    settings: Settings
    problems = ("k",)
    remembers = ("k",)

    def __init__(self, control: Control, **hyperparameters: Any):
        self.by_token = bool(checked_control(control, type(self).__name__).progress)
        self.looks_at = ("drafted", "free") if self.by_token else ("match",)
        super().__init__(control, **hyperparameters)
        self.k_max, self.k = control.max_depth + 1, 0  # of the cycle under way

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        if not self.by_token or self.control.drafted(observation) == 0:
            own = self.settings
            self.k = min(self.k_max, own.k_copied if self.copies(observation) else own.k)
        return self.control.follow(self.k, observation), state

    def copies(self, observation: np.ndarray) -> bool:
        """Return whether the first token of a cycle would be copied."""
        if self.by_token:
            return self.read(observation, "free") == 1
        return round(self.read(observation, "match") * LONGEST) >= SHORTEST

    def space(self, trial: Any) -> dict[str, Any]:
        return {name: trial.suggest_int(name, 0, self.k_max) for name in ("k", "k_copied")}
