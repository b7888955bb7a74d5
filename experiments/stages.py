"""The stages of a command: each is announced in one line that says what begins, why, and about how long it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

LOG = logging.getLogger(__name__)

COSTS, RECORDING, WRITING, TRAINING, STATIC, TABLE = "costs", "recording", "writing", "training", "static", "table"

Announce = Callable[[str], None]
"""Tells the user what begins now."""


class Stages:
    """Numbers the stages of a command, such as ``[2/4] training ppo``.

    Attributes:
        names: of all stages in order; those that are done already are left out.
    """

    def __init__(self, names: Sequence[str] = ()):
        self.names = list(names)

    def begin(self, name: str, doing: str) -> None:
        """Announce that a stage begins, if it is one of ``names``."""
        if name in self.names:
            LOG.info(f"[{self.names.index(name) + 1}/{len(self.names)}] {doing}")


def about(seconds: float) -> str:
    """Return a duration in words, as roughly as it is known: ``"about 20 s"``, ``"about 3 min"``."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {round(seconds, -1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
