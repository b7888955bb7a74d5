"""Results of arms side by side, as tables show them and results.json holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from spec_envs.controls.base import Setting
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.machine import Machine

Histogram = dict[str, dict[str, int]]
"""Counts of each chosen setting, by task or by state of a link."""


@dataclass(frozen=True)
class Interval:
    """A ratio and the bounds of its 95 % interval; written with a format, as in ``f"{interval:.3f}"``, all three."""

    value: float
    low: float
    high: float

    def __contains__(self, ratio: float) -> bool:
        return self.low <= ratio <= self.high

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(kw_only=True)
class Best:
    """The best static setting, chosen on training prompts.

    Attributes:
        best: one value of each axis that the problem offers, or the choice over a link.
        tokens_per_second: of every setting that was tried, by its name.
        best_k: over a link, the best choice that sets only how much of each distribution is sent.
        per_state: over a Markov link without loss, the choice that is best in each of its states.
        pace: over a link, the throughput of the best of these policies, as it was estimated.
    """

    best: list[Setting]
    tokens_per_second: dict[str, float]
    best_k: list[Setting] | None = None
    per_state: dict[str, str] | None = None
    pace: float | None = None


@dataclass(kw_only=True)
class Compared:
    """An arm: its throughput, alone and over that of other arms by name."""

    tokens_per_second: float
    over: Annotated[dict[str, Interval], Inline("over_")]


@dataclass(kw_only=True)
class Row(Compared):
    """An arm of a table: sums over all prompts, and means over cycles and verified tokens."""

    emitted_per_cycle: float
    accepted_per_verified: float
    verified_per_cycle: float
    prefill_seconds: float
    seconds: float
    parts: dict[str, float]
    prompts: int


@dataclass
class Divergence:
    """The distance of the emitted text from the target's own.

    Attributes:
        per_1000: emitted tokens that are not the argmax of one forward over their text, in a thousand.
        largest_gap: the most that the logit of such a token lies below the best one.
        same_text: share of the prompts on which the tokens are those of plain decoding.
    """

    per_1000: float
    largest_gap: float
    same_text: float


@dataclass(frozen=True)
class Drift:
    """The distance of a verifier from the original target, on texts of the target.

    Attributes:
        perplexity: of the texts under the verifier.
        drift: mean KL(target ‖ verifier) in nats per token.
        drift_argmax_per_1000: most probable tokens that are others, in a thousand.
    """

    perplexity: float
    drift: float
    drift_argmax_per_1000: float


@dataclass(kw_only=True)
class Exit:
    """The changes that learning made at an early exit, and the cost of a cycle there.

    Attributes:
        accept_rate_before: share of accepted among verified drafts, of the untrained exit.
        drift: of the verifier from the target.
        cost_of_a_cycle: plain steps that a cycle of the trained exit takes, by part and as a whole.
        same_text: share of the prompts on which an arm emits what its verifier emits by plain decoding.
    """

    exit_layer: int
    adapter: str
    k: int
    accept_rate_before: float
    accept_rate_after: float
    emitted_per_cycle_before: float
    emitted_per_cycle_after: float
    tokens_per_s: float
    plain_tokens_per_s: float
    drift: Annotated[Drift, Inline()]
    cost_of_a_cycle: dict[str, float]
    same_text: dict[str, float] | None = None


@dataclass(kw_only=True)
class Comparison:
    """Arms side by side on the same prompts; plain decoding is among them twice, to show what the machine's noise is.

    Attributes:
        first_try: the results of fewer prompts, on which plain decoding differed from itself.
    """

    arms: Mapping[str, Compared]
    first_try: Comparison | None = None

    @property
    def agrees(self) -> bool:
        """True where the interval of plain decoding over itself (A/A) contains 1."""
        return 1 in self.arms["plain again"].over["plain"]


@dataclass(kw_only=True)
class Results(Comparison):
    """A table with everything that is needed to read it.

    Attributes:
        arms: rows by name.
        references: arms that the others are compared with.
        seconds: cost curves of this machine, seconds by rows of ``verify`` and ``draft``; None where nothing is timed.
        curves: the same in words.
        actions: histograms of the learned arms.
        decisions: the decisions of each learned arm.
        by_task: tokens per second by arm and task.
        link: of an edge and a cloud.
        by_state: histograms of the learned arms by state of the link.
        bytes_per_token: bytes up and down by arm.
        others_text: share of the prompts on which other software emits the tokens of plain decoding.
        static: the best static setting, and the tokens per second of each that was tried.
        exit: of a run that trains an early exit.
    """

    arms: dict[str, Row]
    references: list[str]
    prompts: int
    tasks: list[str]
    max_new_tokens: int
    temperature: float
    machine: Machine
    seconds: dict[str, dict[int, float]] | None
    curves: str | None
    actions: dict[str, Histogram]
    decisions: dict[str, str]
    by_task: dict[str, dict[str, float]]
    link: str | None = None
    by_state: dict[str, Histogram] | None = None
    bytes_per_token: dict[str, list[float]] | None = None
    others_text: dict[str, float] | None = None
    divergences: dict[str, Divergence] | None = None
    static: Best | None = None
    exit: Exit | None = None
    first_try: Results | None = None
