"""Decide who drafts, and how much of it is verified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from spec_envs.controls.base import LONGEST_CHAIN, Control, Setting
from spec_envs.controls.budgets import check_tree
from spec_envs.controls.observation.entries import Entry, match_of, one_hot, text_entries
from spec_envs.controls.observation.text_kind import KINDS, TextKind
from spec_envs.controls.plans import ChoicePlans
from spec_envs.decoding.clock import DRAFTER
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.names import BLOCKS, DrafterName, static_over_plain
from spec_envs.decoding.drafters.portfolio import Portfolio, default_members, members
from spec_envs.decoding.loading import DEFAULT_TARGET

PLAIN = "plain"  # setting in which nobody drafts
NEUTRAL, RATE = 0.5, 0.2  # where every survival starts, and how far a cycle moves it
LAG_UNIT = 64  # rows to catch up that the observation shows as 1


class DrafterControl(Control):
    """
    ## Description

    Several drafters read the text: some copy from it (`lookup`, `suffix`), some are models that draft chains, some are EAGLE
    heads that draft trees. Every cycle the agent chooses who drafts and how much of it the target verifies, or that
    nobody drafts, which is a step of plain decoding. Where the text repeats itself a copy is right and costs nothing;
    elsewhere a model earns its forwards, or nothing does. A drafter that was not asked notes what joins the text and
    reads it in one forward when it is asked again; that forward's rows are charged.

    Engines of today ask drafters in a fixed order. Here all that is known about them is observed: drafters without
    weights tell after every cycle how many tokens they would have got right, because that costs nothing.

    ## Action Space

    `Discrete(1 + D · S)` for D drafters and S `sizes`. Action 0 is plain decoding. Action 1 + i · S + j asks drafter i:
    one of chains for `sizes[j]` tokens, all of which are verified; one of trees for a tree of `depths[j]` expansions,
    of which the `sizes[j]` best nodes are verified. A drafter that has nothing more to propose drafts fewer.

    As a static setting, for the agents `fixed` and `fixed-order`, action 0 is called `plain` and the others by drafter and
    size, such as `lookup:4`. `env.unwrapped.control.settings()` lists these names in the order of the actions.

    ## Observation Space

    A `Box` of float32; with the default four drafters, `lookup`, `suffix`, an EAGLE-3 head and a draft model:

    | Num | Observation | Min | Max |
    |-----|-------------|-----|-----|
    | 0–1 | `match`: per drafter that copies, how many of the text's last tokens match the place to copy from, / 16 | 0 | 1 |
    | 2–13 | `survival`: per action that asks a drafter, the mean of accepted tokens / size over the cycles in which that is known, recent ones weighing more; it starts at 0.5 | 0 | 1 |
    | 14–17 | `scores`: per drafter, its right tokens in the last cycle / largest size, 0 where not known | 0 | 1 |
    | 18–21 | `known`: per drafter, 1 where that is known: for the one that was asked, and for every drafter without weights | 0 | 1 |
    | 22–25 | `lag`: per drafter, rows of the text that it has to read before it drafts, / 64; 0 without weights | 0 | 1 |
    | 26–38 | `last`: one-hot of the last action, 0 before the first | 0 | 1 |
    | 39 | `last_accepted`: accepted tokens of the last cycle / largest size | 0 | 1 |
    | 40 | `position`: emitted tokens / `max_new_tokens` | 0 | 1 |
    | 41 | `context`: tokens of the text / 4096 | 0 | 1 |
    | 42–46 | `kind`: one-hot of code, prose, math, json, list, detected from the last 96 tokens | 0 | 1 |

    One chain also tells how many tokens of a shorter one by the same drafter would have been accepted, and of a longer
    one if a token was rejected: `survival` moves at all of these sizes. `match` is left out where no drafter copies.

    ## Starting State

    The target's first token after the prompt, which every drafter has read; nothing is drafted.

    ## Information

    - `drafter`: name of the drafter that was asked, `""` for plain decoding.

    ## Arguments

    - `sizes=(2, 4, 8)`: tokens of a chain, or nodes of a tree that are verified; ascending.
    - `depths=(0, 1, 2)`: expansions of the tree of each of these sizes, after its first level.
    - `width=4`: children per node of a tree, and nodes expanded per level.

    and the shared ones; `drafter` is several names joined by commas, by default `lookup`, `suffix` and every drafter of
    the target in models.yml whose name has no `lookup+` or `suffix+`.

    ## Version History

    - v0: initial version.
    """

    name = "drafter"
    trace_kind = "portfolio"
    observations = ("default",)
    prunable = False

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        drafter: str = "auto",
        sizes: Sequence[int] = (2, 4, 8),
        depths: Sequence[int] = (0, 1, 2),
        width: int = 4,
        observation: str = "default",
        cost_features: bool = False,
    ):
        super().__init__(observation, cost_features)
        if not sizes or min(sizes) < 1 or max(sizes) > LONGEST_CHAIN or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"sizes is {list(sizes)}; expected ascending numbers of tokens, 1 to {LONGEST_CHAIN}")
        if len(depths) != len(sizes) or min(depths) < 0 or list(depths) != sorted(depths):
            raise ValueError(
                f"depths is {list(depths)}; expected expansions for each of the {len(sizes)} sizes, 0 or more and not "
                "fewer for a larger size"
            )
        if width < 1:
            raise ValueError(f"width is {width}; expected at least 1")
        self.max_depth, self.width = max(sizes[-1] - 1, *depths), width
        check_tree(max(depths), width)
        self.sizes, self.depths = tuple(sizes), tuple(depths)
        names = members(self.default_drafter(target) if drafter == "auto" else drafter)
        self.drafters = tuple(map(str, names))
        self.copiers = tuple(str(name) for name in names if name.copies)
        self.arms = len(names) * len(sizes)
        self.action_space = spaces.Discrete(1 + self.arms)
        self._forget()
        self.declare(self._entries())

    def _entries(self) -> list[Entry]:
        count = len(self.drafters)
        match = [Entry("match", len(self.copiers), 0.0, 1.0, self._read_match)] if self.copiers else []
        return [
            *match,
            Entry("survival", self.arms, 0.0, 1.0, self._read_survival),
            Entry("scores", count, 0.0, 1.0, self._read_scores),
            Entry("known", count, 0.0, 1.0, self._read_known),
            Entry("lag", count, 0.0, 1.0, self._read_lag),
            Entry("last", 1 + self.arms, 0.0, 1.0, self._read_last),
            Entry("last_accepted", 1, 0.0, 1.0, self._read_last_accepted),
            *text_entries(),
            Entry("kind", len(KINDS), 0.0, 1.0, self._read_kind),
        ]

    def default_drafter(self, target: str) -> str:
        return default_members(target)

    def check_drafter(self, drafter: str) -> None:
        """Refuse drafters other than those that the observation was made for."""
        if (found := tuple(map(str, members(drafter)))) != self.drafters:
            raise ValueError(
                f"the decoder's drafters are {', '.join(found)}, the control was made for {', '.join(self.drafters)}; "
                "make both with the same target and drafter"
            )

    def static_over_plain(self, target: str, drafter: str) -> float:
        return max(static_over_plain(target, str(name)) for name in members(drafter))

    def reset(self, rng: np.random.Generator, task: str = "") -> None:
        super().reset(rng, task)
        self._forget()

    def _forget(self) -> None:
        self.survival = np.full((len(self.drafters), len(self.sizes)), NEUTRAL)
        self.right: dict[int, int] = {}  # right tokens in the last cycle of every drafter of which they are known
        self.last: int | None = None
        self.last_accepted = 0
        self.kind = TextKind()

    def settings(self) -> tuple[Setting, ...]:
        return (PLAIN, *(f"{name}:{size}" for name in self.drafters for size in self.sizes))

    def follow(self, setting: Setting, observation: np.ndarray) -> int:
        offered = self.settings()
        if setting not in offered:
            raise ValueError(f"there is no setting {setting!r}; expected one of {', '.join(map(str, offered))}")
        return offered.index(setting)

    def asked(self, action: int) -> tuple[int, int] | None:
        """Return the numbers of the drafter and of the size that an action asks for; None for plain decoding."""
        return divmod(action - 1, len(self.sizes)) if action else None

    def details(self, decoder: Any, cycle: Cycle | None) -> dict[str, Any]:
        asked = None if cycle is None or self.last is None else self.asked(self.last)
        return {"drafter": self.drafters[asked[0]] if asked else ""}

    def plans(self) -> ChoicePlans:
        """Return a plan for every action, in their order."""
        nodes, longest = [0], [0]
        forwards: list[list[tuple[str, int]]] = [[]]
        for name in map(DrafterName.parse, self.drafters):
            for size, depth in zip(self.sizes, self.depths, strict=True):
                if name.kind in BLOCKS:
                    rows = [self.max_depth + 1]  # all positions of a block in one forward
                else:
                    rows = [1] * size if name.single else [1, *[self.width] * depth]
                forwards.append([(f"{DRAFTER}{name}", n) for n in rows] if name.model else [])
                nodes.append(size)
                longest.append(size if name.single or name.copies else min(size, depth + 1))
        count = np.array(nodes)
        lag = self.slices["lag"].start
        lags = (lag, *np.repeat(np.arange(lag, lag + len(self.drafters)), len(self.sizes)).tolist())
        actions = np.arange(len(nodes))
        return ChoicePlans(
            np.array(longest) - 1, count, count, actions, drafts_by=forwards, lags=lags, lag_unit=LAG_UNIT
        )

    def prepare(self, decoder: Decoder) -> None:
        """Draft nothing: who drafts is decided before."""

    def act(self, decoder: Decoder, action: int) -> Cycle | None:
        portfolio, asked = self._portfolio(decoder), self.asked(action)
        ahead = {i: portfolio.ahead(i, self.sizes[-1]) for i in portfolio.free}
        cycle = self._cycle(decoder, portfolio, asked)
        self.right = {}
        for drafter, chain in ahead.items():
            right = common(chain, cycle.tokens)
            self._learn(drafter, right, known=right < cycle.emitted or right == len(chain))
        if asked and asked[0] not in ahead:
            drafter, size = asked
            if portfolio.draws_trees(drafter):
                self.right[drafter] = cycle.accepted
                self._move(drafter, size, cycle.accepted)
            else:
                rejected = cycle.accepted < cycle.verified or cycle.verified < self.sizes[size]
                self._learn(drafter, cycle.accepted, known=rejected)
        self.last, self.last_accepted = action, cycle.accepted
        return cycle

    def _cycle(self, decoder: Decoder, portfolio: Portfolio, asked: tuple[int, int] | None) -> Cycle:
        """Decode a cycle that a drafter drafts, or nobody."""
        portfolio.choose(asked and asked[0])
        if asked is None:
            return decoder.cycle(0)
        drafter, size = asked
        if not portfolio.draws_trees(drafter):
            return decoder.cycle(self.sizes[size])
        decoder.begin()
        for _ in range(self.depths[size]):
            decoder.expand()
        return decoder.verify(self.sizes[size])

    def _learn(self, drafter: int, right: int, known: bool) -> None:
        """Note how many of a chain's first tokens were right.

        Args:
            known: whether the next token was wrong or not drafted; else longer chains may have been right further.
        """
        self.right[drafter] = right
        for j, size in enumerate(self.sizes):
            if known or right >= size:
                self._move(drafter, j, min(right, size))

    def _move(self, drafter: int, size: int, accepted: int) -> None:
        """Move the mean of a drafter at a size towards its accepted tokens in this cycle."""
        self.survival[drafter, size] += RATE * (accepted / self.sizes[size] - self.survival[drafter, size])

    def _portfolio(self, decoder: Decoder) -> Portfolio:
        """Return the drafters of a decoder.

        Raises:
            ValueError: it has others than this control was made for.
        """
        portfolio = decoder.drafter
        if not isinstance(portfolio, Portfolio) or portfolio.names != self.drafters:
            raise ValueError(
                f"the decoder does not have the drafters {', '.join(self.drafters)}; open it with control.open, or give "
                f"load_decoder drafter={','.join(self.drafters)!r}"
            )
        return portfolio

    def _read_match(self, decoder: Decoder) -> list[float]:
        portfolio = self._portfolio(decoder)
        return [] if decoder.finished else [match_of(copier) for copier in portfolio.copiers]

    def _read_survival(self, decoder: Decoder) -> np.ndarray:
        return self.survival.ravel()

    def _read_scores(self, decoder: Decoder) -> list[float]:
        return [self.right.get(i, 0) / self.sizes[-1] for i in range(len(self.drafters))]

    def _read_known(self, decoder: Decoder) -> list[float]:
        return [float(i in self.right) for i in range(len(self.drafters))]

    def _read_lag(self, decoder: Decoder) -> list[float]:
        return [] if decoder.finished else [lag / LAG_UNIT for lag in self._portfolio(decoder).lags]

    def _read_last(self, decoder: Decoder) -> np.ndarray:
        shown = np.zeros(1 + self.arms)
        if self.last is not None:
            shown[self.last] = 1.0
        return shown

    def _read_last_accepted(self, decoder: Decoder) -> float:
        return self.last_accepted / self.sizes[-1]

    def _read_kind(self, decoder: Decoder) -> list[float]:
        return one_hot(self.kind.read(decoder), KINDS)


def common(chain: Sequence[int], tokens: Sequence[int]) -> int:
    """Return how many of the first tokens of two sequences are the same."""
    right = 0
    while right < min(len(chain), len(tokens)) and chain[right] == tokens[right]:
        right += 1
    return right
