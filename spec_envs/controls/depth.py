"""Decide how deep to draft."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import numpy as np
from gymnasium import spaces

from spec_envs.controls import candidates
from spec_envs.controls.base import Control, Setting
from spec_envs.controls.budgets import check_tree
from spec_envs.controls.observation.entries import frontier_entry, ltd_entries, progress_entries, survival_entry
from spec_envs.controls.observation.recorded import recorded_last_level
from spec_envs.controls.plans import Plans, tree_plans
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.decoder import Decoder

VERIFY, EXPAND = 0, 1


class DepthControl(Control):
    """
    ## Description

    The drafter grows a token tree level by level. After each level the agent decides whether to grow another or to
    have the target verify what is there. Deep trees pay where the text is predictable; elsewhere each level costs a
    drafter forward for nothing. The first expansion of a cycle is always made, and at `max_depth` verification
    follows within the step, so every decision is a real one. Where the drafter has nothing more to draft, as after copies,
    action 1 verifies, too.

    This is the depth problem of Learning to Draft (ICLR 2026, arXiv 2603.01639).

    ## Action Space

    `Discrete(2)`: 0 verifies, 1 expands by one more level.

    ## Observation Space

    A `Box` of float32; with the default `width=10` and `max_depth=12`:

    | Num | Observation | Min | Max |
    |-----|-------------|-----|-----|
    | 0–9 | `frontier`: path probabilities of the nodes the next expansion would feed, best first | 0 | 1 |
    | 10–22 | `survival`: per level, the summed path probability of its candidates (0 where not grown) | 0 | 1 |
    | 23 | `expansions`: levels grown so far / `max_depth` | 0 | 1 |
    | 24–25 | `recent`: accepted tokens per cycle over 4 and 16 cycles / (`max_depth` + 1) | 0 | 1 |
    | 26 | `position`: emitted tokens / `max_new_tokens` | 0 | 1 |
    | 27 | `context`: tokens of the text / 4096 | 0 | 1 |

    `observation="ltd"` is the published vector of 128: the 100 path log-probabilities of the last expansion,
    length / 1000 in 14 slots, expansions / 10 in 14 slots.

    ## Starting State

    The target's first token after the prompt, a first level and one expansion.

    ## Arguments

    - `max_depth=12`: most expansions after the first level.
    - `width=10`: children per node, and nodes expanded per level.
    - `budget=7`: nodes verified.

    and the shared ones.

    ## Version History

    - v0: initial version.
    """

    name, partner_name = "depth", "budget"
    trace_kind = "tree"

    def __init__(
        self,
        max_depth: int = 12,
        width: int = 10,
        budget: int = 7,
        observation: str = "default",
        cost_features: bool = False,
    ):
        super().__init__(observation, cost_features)
        if max_depth < 2 or width < 1 or budget < 0:
            raise ValueError(
                f"max_depth, width and budget are {max_depth}, {width} and {budget}; expected at least 2, 1 and 0"
            )
        check_tree(max_depth, width)
        self.max_depth, self.width, self.budgets = max_depth, width, (budget,)
        self.action_space = spaces.Discrete(2)
        self.progress, self.full_progress = ("depth", 10) if observation == "ltd" else ("expansions", max_depth)
        if observation == "ltd":
            self.declare(ltd_entries(width * width, attrgetter("tree.last_level"), recorded_last_level, repeats=14))
        else:
            self.declare([frontier_entry(width), survival_entry(max_depth), *progress_entries()])

    def settings(self) -> tuple[Setting, ...]:
        return tuple(range(1, self.max_depth + 1))

    def follow(self, setting: Setting, observation: np.ndarray) -> int:
        depth = int(setting)
        if not 1 <= depth <= self.max_depth:
            raise ValueError(f"depth is {depth}; expected 1 to {self.max_depth}")
        return EXPAND if self.drafted(observation) < depth else VERIFY

    def followed(self, actions: Sequence[int], lengths: Sequence[int]) -> list[Setting]:
        found: list[Setting] = []
        depth = 1  # the first expansion is always made
        for action in actions:
            depth += action
            if action == VERIFY or depth == self.max_depth:
                found.append(depth)
                depth = 1
        return found

    def candidates(self) -> dict[str, Sequence[Setting]]:
        return {"depth": candidates.depths(self.max_depth), "budget": candidates.BUDGETS}

    def static(self, *values: Setting) -> tuple[Control, Setting]:
        depth, budget = map(int, values)
        return DepthControl(self.max_depth, self.width, budget), depth

    def plans(self) -> Plans:
        depths, shown = range(self.max_depth + 1), self.place("expansions")
        return tree_plans(depths, self.budgets, self.width, VERIFY, EXPAND, made=1, runs_out=True, shown=shown)

    def fix_partner(self, value: int) -> None:
        self.budgets = (value,)

    def prepare(self, decoder: Decoder) -> None:
        if decoder.tree.expansions == 0:
            decoder.expand()

    def act(self, decoder: Decoder, action: int) -> Cycle | None:
        self.prepare(decoder)
        if action == EXPAND and decoder.expand() and decoder.tree.expansions < self.max_depth:
            return None
        return decoder.verify(self._budget(decoder))

    def _budget(self, decoder: Decoder) -> int:
        """Return the nodes to verify: the partner's choice, if there is one."""
        if self.partner is None:
            return self.budgets[0]
        return self.partner.control.budgets[self.partner.decide(decoder)]
