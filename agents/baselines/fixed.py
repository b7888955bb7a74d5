"""One setting for every cycle: the static baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from spec_envs.agents.base import checked_control
from spec_envs.agents.rules.base import Rule
from spec_envs.agents.settings import SeededSettings
from spec_envs.controls.base import Control, Setting

MOST_LISTED = 24  # an error lists every setting if there are no more than this


class FixedAgent(Rule):
    """Follows one static setting of the problem in every cycle: the same depth, number of nodes, chain length or message
    whatever the text is like. The best static setting is what an adaptive agent has to beat, and every table of results
    has it.

    Raises:
        ValueError: a value that the control does not offer, or an observation from which none can be followed.
    """

    class Settings(SeededSettings):  # it draws nothing; run folders of before hold a seed
        value: Setting = Field(
            description="one of `control.settings()`: a depth (SpecDepth-v0), a number of nodes (SpecBudget-v0), both "
            '("2x7" in SpecTree-v0; YAML wants quotes around "0x7", which is a number to it), a chain length '
            '(SpecK-v0), who drafts how much ("plain", "lookup:4" in SpecDrafter-v0) or what is sent over a link ("4x300", '
            '"cloud 64" in SpecTopK-v0)'
        )

    settings: Settings

    def __init__(self, control: Control, **hyperparameters: Any):
        progress = checked_control(control, type(self).__name__).progress
        self.looks_at = (progress,) if progress else ()
        super().__init__(control, **hyperparameters)
        value, offered = self.settings.value, control.settings()
        if not offered:
            raise ValueError(f"{control.env_id} has no static settings that fixed could follow; take another agent")
        if value not in offered:
            named = [str(setting) for setting in offered]
            if len(named) > MOST_LISTED:
                named[MOST_LISTED // 2 : -1] = ["…"]
            raise ValueError(f"value is {value!r}; expected one of {', '.join(named)}")

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        return self.control.follow(self.settings.value, observation), state
