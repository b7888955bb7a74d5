"""Decide how many nodes to verify."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from gymnasium import spaces

from spec_envs.controls import candidates
from spec_envs.controls.base import Control, Setting
from spec_envs.controls.budgets import offered
from spec_envs.controls.observation.entries import gains_entry, ltd_entries, progress_entries, survival_entry
from spec_envs.controls.observation.recorded import recorded_scores
from spec_envs.controls.plans import Plans, tree_plans
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.decoder import Decoder


class BudgetControl(Control):
    """
    ## Description

    A tree of fixed depth has been drafted; the agent decides how many of its best nodes the target verifies. A larger
    budget accepts more and makes the forward slower, by as much as the machine's cost curve shows.

    This is the size problem of Learning to Draft (ICLR 2026, arXiv 2603.01639).

    ## Action Space

    `Discrete(len(budgets))`: action i verifies the `budgets[i]` best nodes by path log-probability.

    ## Observation Space

    A `Box` of float32; with the default 12 `budgets` and `max_depth=12`:

    | Num | Observation | Min | Max |
    |-----|-------------|-----|-----|
    | 0–11 | `gains`: per budget, the summed path probability of the nodes it adds to the one before / (`max_depth` + 1) | 0 | 1 |
    | 12–24 | `survival`: per level, the summed path probability of its candidates (0 where not grown) | 0 | 1 |
    | 25 | `expansions`: levels grown / `max_depth` | 0 | 1 |
    | 26–27 | `recent`: accepted tokens per cycle over 4 and 16 cycles / (`max_depth` + 1) | 0 | 1 |
    | 28 | `position`: emitted tokens / `max_new_tokens` | 0 | 1 |
    | 29 | `context`: tokens of the text / 4096 | 0 | 1 |

    `observation="ltd"` is the published vector (1268 at depth 12): all path log-probabilities, zero-padded,
    length / 1000 in 29 slots, expansions / 10 in 29 slots.

    ## Starting State

    The target's first token after the prompt, and a tree of the given depth.

    ## Arguments

    - `budgets=(3, 7, …, 95)`: numbers of nodes that the actions stand for. With the root, the default ones fill whole
      tiles of a matrix unit; `"ltd"` is 10…240 by 10, `"ltd-paper"` 20…240 by 20.
    - `depth=1`: expansions after the first level, or `"random"`, drawn from 1…`max_depth` every cycle.
    - `max_depth=12`: most expansions.
    - `width=10`: children per node, and nodes expanded per level.

    and the shared ones.

    ## Version History

    - v0: initial version.
    """

    name, partner_name = "budget", "depth"
    trace_kind = "tree"

    def __init__(
        self,
        budgets: Sequence[int] | str = (3, 7, 11, 15, 19, 23, 31, 39, 47, 63, 79, 95),
        depth: int | str = 1,
        max_depth: int = 12,
        width: int = 10,
        observation: str = "default",
        cost_features: bool = False,
    ):
        super().__init__(observation, cost_features)
        self.budgets = offered(budgets, max_depth, width)
        if depth != "random" and not (isinstance(depth, int) and 0 <= depth <= max_depth):
            raise ValueError(f"depth is {depth!r}; expected a number from 0 to max_depth ({max_depth}) or 'random'")
        self.depth, self.max_depth, self.width = depth, max_depth, width
        self.action_space = spaces.Discrete(len(self.budgets))
        if observation == "ltd":
            candidates = width + width * width * max_depth
            self.declare(ltd_entries(candidates, attrgetter("tree.scores"), recorded_scores, repeats=29))
        else:
            self.declare([gains_entry(self.budgets), survival_entry(max_depth), *progress_entries()])

    def settings(self) -> tuple[Setting, ...]:
        return self.budgets

    def candidates(self) -> dict[str, Sequence[Setting]]:
        return {"depth": candidates.depths(self.max_depth), "budget": candidates.BUDGETS}

    def static(self, *values: Setting) -> tuple[Control, Setting]:
        depth, budget = map(int, values)
        return BudgetControl((budget,), depth, self.max_depth, self.width), budget

    def fix_drawn(self, *values: Setting) -> None:
        if self.depth == "random":
            self.fix_partner(int(values[0]))

    def fix_partner(self, value: int) -> None:
        if not 0 <= value <= self.max_depth:
            raise ValueError(f"depth is {value}; expected 0 to {self.max_depth}")
        self.depth = value

    def plans(self) -> Plans:
        drawn = self.depth == "random"
        depths = range(1, self.max_depth + 1) if drawn else [int(self.depth)]
        return tree_plans(depths, self.budgets, self.width, 0, made=None if drawn else int(self.depth))

    def prepare(self, decoder: Decoder) -> None:
        if decoder.drafting:
            return
        if self.partner:
            grew = decoder.expand()
            while grew and decoder.tree.expansions < self.max_depth and self.partner.decide(decoder):
                grew = decoder.expand()
        else:
            depth = self.rng.integers(1, self.max_depth + 1) if self.depth == "random" else self.depth
            decoder.begin()
            for _ in range(int(depth)):
                decoder.expand()

    def act(self, decoder: Decoder, action: int) -> Cycle | None:
        self.prepare(decoder)
        return decoder.verify(self.budgets[action])
