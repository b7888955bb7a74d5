"""The base class of rules that choose who drafts."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from spec_envs.agents.base import checked_control
from spec_envs.agents.rules.base import Rule
from spec_envs.controls.base import Control
from spec_envs.controls.drafter import DrafterControl
from spec_envs.decoding.drafters.lookup import LONGEST
from spec_envs.decoding.drafters.names import DrafterName


class DrafterRule(Rule):
    """A rule that chooses the drafter of every cycle, and how much of its draft is verified. An *arm* is an action: a
    plain step, or a drafter with one of its sizes.

    Attributes:
        arms: static setting of each arm.
        copies: those of them that ask a drafter without weights.
        sizes: what each arm drafts at most ``[arms]``, in tokens of a chain or nodes of a tree; 0 for the plain step.
        drafter: number of each arm's drafter ``[arms]``; −1 for the plain step.
        largest: largest of the sizes.
    """

    problems = ("drafter",)
    control: DrafterControl
    looks_at: tuple[str, ...]

    def __init__(self, control: Control, **hyperparameters: Any):
        if "match" not in checked_control(control, type(self).__name__).slices:  # no drafter copies
            self.looks_at = tuple(name for name in self.looks_at if name != "match")
        super().__init__(control, **hyperparameters)
        drafters, sizes = self.control.drafters, self.control.sizes
        self.arms = [str(setting) for setting in control.settings()]
        self.sizes = np.array([0, *sizes * len(drafters)])
        self.drafter = np.repeat(np.arange(-1, len(drafters)), [1, *[len(sizes)] * len(drafters)])
        self.largest = sizes[-1]
        self.names = [DrafterName.parse(name) for name in drafters]
        self.copies = [self.arms[i] for i, d in enumerate(self.drafter) if d >= 0 and not self.names[d].model]

    def numbers(self, observation: np.ndarray, name: str) -> np.ndarray:
        """Return all numbers of an entry of the observation."""
        numbers: np.ndarray = observation[self.control.slices[name]].astype(np.float64)
        return numbers

    def matches(self, observation: np.ndarray) -> np.ndarray:
        """Return how many of the text's last tokens match the place that each copier would copy from ``[copiers]``."""
        shown = self.numbers(observation, "match") if self.control.copiers else np.zeros(0)
        matches: np.ndarray = np.rint(shown * LONGEST)
        return matches

    def accepted(self, observation: np.ndarray) -> int:
        """Return the accepted tokens of the last cycle."""
        return round(self.read(observation, "last_accepted") * self.largest)


class PricedDrafterRule(DrafterRule):
    """A rule that weighs tokens against seconds, which it reads from ``control.costs`` when it first decides."""

    needs_costs = True

    @functools.cached_property
    def prices(self) -> np.ndarray:
        """Price of a cycle by arm ``[arms]`` in units of a plain step, under the control's cost table. What a drafter
        that was left out has to catch up with is not part of it.

        Raises:
            ValueError: the control has no cost table.
        """
        if self.control.costs is None:
            raise ValueError(
                f"{type(self).__name__} needs the seconds of forwards: set the control's costs to a CostTable, "
                "or load a run whose clock is one or was calibrated"
            )
        seconds = self.control.plans().verification(self.control.costs)
        prices: np.ndarray = seconds / seconds[0]
        return prices
