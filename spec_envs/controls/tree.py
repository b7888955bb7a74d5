"""Decide how deep to draft and how many nodes to verify, together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gymnasium import spaces

from spec_envs.controls import candidates
from spec_envs.controls.base import Control, Setting
from spec_envs.controls.budgets import offered
from spec_envs.controls.observation.entries import Entry, frontier_entry, gains_entry, progress_entries, survival_entry
from spec_envs.controls.observation.recorded import ENTROPY_UNIT, recorded_entropy
from spec_envs.controls.plans import Plans, tree_plans
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.decoder import Decoder

EXPAND = 0


class TreeControl(Control):
    """
    ## Description

    The drafter grows a token tree level by level. After each level the agent decides whether to grow another, or how
    many of the best nodes the target verifies. What a further level is worth depends on how many nodes are verified,
    and the other way round: here one policy decides both.

    This is the problem that Learning to Draft (ICLR 2026, arXiv 2603.01639) splits into SpecDepth-v0 and SpecBudget-v0.

    ## Action Space

    `Discrete(1 + len(budgets))`: 0 expands by one more level; action i ≥ 1 verifies the `budgets[i − 1]` best nodes by
    path log-probability. No expansion is forced. Where there is no further level, at `max_depth` or because the drafter
    has nothing more to draft, action 0 verifies the largest budget.

    ## Observation Space

    A `Box` of float32; with the default 13 `budgets`, `width=10` and `max_depth=12`:

    | Num | Observation | Min | Max |
    |-----|-------------|-----|-----|
    | 0–9 | `frontier`: path probabilities of the nodes the next expansion would feed, best first | 0 | 1 |
    | 10–22 | `survival`: per level, the summed path probability of its candidates (0 where not grown) | 0 | 1 |
    | 23–35 | `gains`: per budget, the summed path probability of the nodes it adds to the one before / (`max_depth` + 1) | 0 | 1 |
    | 36 | `entropy`: of the drafter's distribution after the root, or after the best node that the last expansion fed; nats / 10 | 0 | 1 |
    | 37 | `expansions`: levels grown so far / `max_depth` | 0 | 1 |
    | 38–39 | `recent`: accepted tokens per cycle over 4 and 16 cycles / (`max_depth` + 1) | 0 | 1 |
    | 40 | `position`: emitted tokens / `max_new_tokens` | 0 | 1 |
    | 41 | `context`: tokens of the text / 4096 | 0 | 1 |

    ## Starting State

    The target's first token after the prompt, and a first level.

    ## Arguments

    - `budgets=(1, 3, 7, …, 95)`: numbers of nodes that may be verified; 0 is plain decoding. With the root, the default
      ones fill whole tiles of a matrix unit; `"ltd"` is 10…240 by 10, `"ltd-paper"` 20…240 by 20.
    - `max_depth=12`: most expansions after the first level.
    - `width=10`: children per node, and nodes expanded per level.

    and the shared ones.

    ## Version History

    - v0: initial version.
    """

    name = "tree"
    trace_kind = "tree"
    observations = ("default",)

    def __init__(
        self,
        max_depth: int = 12,
        width: int = 10,
        budgets: Sequence[int] | str = (1, 3, 7, 11, 15, 19, 23, 31, 39, 47, 63, 79, 95),
        observation: str = "default",
        cost_features: bool = False,
    ):
        super().__init__(observation, cost_features)
        self.budgets = offered(budgets, max_depth, width)
        self.max_depth, self.width = max_depth, width
        self.progress, self.full_progress = "expansions", max_depth
        self.action_space = spaces.Discrete(1 + len(self.budgets))
        self.declare(
            [
                frontier_entry(width),
                survival_entry(max_depth),
                gains_entry(self.budgets),
                Entry("entropy", 1, 0.0, 1.0, read_entropy, recorded_entropy),
                *progress_entries(),
            ]
        )

    def settings(self) -> tuple[Setting, ...]:
        return tuple(f"{depth}x{budget}" for depth in range(self.max_depth + 1) for budget in self.budgets)

    def follow(self, setting: Setting, observation: np.ndarray) -> int:
        depth, budget = map(int, str(setting).split("x"))
        if not 0 <= depth <= self.max_depth or budget not in self.budgets:
            raise ValueError(f"there is no setting {setting}; expected DEPTHxBUDGET, for example {self.settings()[0]}")
        return EXPAND if self.drafted(observation) < depth else 1 + self.budgets.index(budget)

    def followed(self, actions: Sequence[int], lengths: Sequence[int]) -> list[Setting]:
        found: list[Setting] = []
        decisions = iter(actions)
        for drafted in lengths:
            depth = max(0, drafted - self.width) // self.width**2
            *_, last = (next(decisions) for _ in range(depth + 1))  # each expansion, and the verification
            found.append(f"{depth}x{self.budgets[last - 1]}")
        return found

    def candidates(self) -> dict[str, Sequence[Setting]]:
        return {"depth": [0, *candidates.depths(self.max_depth)], "budget": [1, *candidates.BUDGETS]}

    def static(self, *values: Setting) -> tuple[Control, Setting]:
        depth, budget = map(int, values)
        return TreeControl(self.max_depth, self.width, (budget,)), f"{depth}x{budget}"

    def plans(self) -> Plans:
        depths, shown = range(self.max_depth + 1), self.place("expansions")
        return tree_plans(depths, self.budgets, self.width, 1, EXPAND, shown=shown)

    def prepare(self, decoder: Decoder) -> None:
        decoder.begin()

    def act(self, decoder: Decoder, action: int) -> Cycle | None:
        self.prepare(decoder)
        if action == EXPAND and decoder.tree.expansions < self.max_depth and decoder.expand():
            return None
        return decoder.verify(self.budgets[action - 1])  # after EXPAND, budgets[-1], the largest


def read_entropy(decoder: Decoder) -> float:
    """Return the entropy of the distribution that the last level's first nodes are from, in units of 10 nats. It is the
    root's, or that of the best node which the last expansion fed; 0 before anything is drafted."""
    return float(decoder.tree.entropies[-1][0]) / ENTROPY_UNIT if decoder.tree.size else 0.0
