"""Results of arms that were measured side by side, as tables show them and results.json holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from spec_envs.controls.base import Setting
from spec_envs.decoding.drafters import names
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.machine import Machine

PAIR = "pair's static"  # arm of the best static setting of the pair or of lookup alone, where it is another one
ALONE = "static without alternatives"  # arm of the best chain length where no alternatives are verified beside chains
COPIES = "static by copies"  # arm of the best two chain lengths, where chains may begin with copies
LOOKUP = "static lookup"  # arm of the best chain length of prompt lookup alone
AGAIN = " again"  # ends the name of the second measurement of an arm
QUIET = 0.05  # bounds of the A/A interval around 1 within which timings are trusted

Histogram = dict[str, dict[str, int]]
"""Counts of each setting that was chosen, by task or by state of a link."""


def looked_up(setting: Sequence[Setting]) -> int | None:
    """Return K where a static setting is ``lookup:K``, prompt lookup alone; None where it is another one."""
    drafter, _, k = str(setting[0]).partition(":")
    return int(k) if drafter == names.LOOKUP else None


@dataclass(frozen=True)
class Interval:
    """A ratio and the bounds of its 95 % interval. ``f"{interval:.3f}"`` formats all three numbers."""

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
        best: one value for each axis of the problem, or the choice over a link.
        tokens_per_second: throughput of every setting that was tried, by its name.
        best_k: over a link, the best choice that varies only how much of each distribution is sent.
        per_state: over a Markov link without loss, the best choice for each of its states.
        pace: over a link, the estimated throughput of the best of these policies.
        pair: the best setting of the pair of models, whatever the environment lets its agent decide, or ``lookup:K``
            where chains of K tokens by prompt lookup alone are faster; None where it was not searched for.
        lookup: the best chain length of prompt lookup alone; None where it is the drafter itself, or where it was not
            searched for.
        alone: where alternatives are verified beside chains, the best length without them.
        copied: where chains may begin with copies, their best two lengths: of cycles whose first token the draft model
            drafts, and of those whose first token is a copy; None elsewhere, or where they were not searched for.
        fixed_order: where the agent chooses between drafters, the hyper-parameters of the best rule ``fixed-order``.
    """

    best: list[Setting]
    tokens_per_second: dict[str, float]
    best_k: list[Setting] | None = None
    per_state: dict[str, str] | None = None
    pace: float | None = None
    fixed_order: dict[str, Any] | None = None
    pair: list[Setting] | None = None
    copied: list[int] | None = None
    alone: list[int] | None = None
    lookup: list[int] | None = None

    @property
    def looks_up(self) -> bool:
        """True if the best setting of the pair is prompt lookup alone."""
        return self.pair is not None and looked_up(self.pair) is not None


@dataclass(kw_only=True)
class Compared:
    """The throughput of an arm, and its ratios to that of other arms by name."""

    tokens_per_second: float
    over: Annotated[dict[str, Interval], Inline("over_")]


@dataclass(kw_only=True)
class Row(Compared):
    """A row of a table about one arm: sums over all prompts, and means over cycles and verified tokens."""

    emitted_per_cycle: float
    accepted_per_verified: float
    verified_per_cycle: float
    prefill_seconds: float
    seconds: float
    parts: dict[str, float]
    prompts: int


@dataclass
class Divergence:
    """The difference of emitted texts from the target's own.

    Attributes:
        per_1000: emitted tokens, of 1,000, that are not the argmax of a single forward over their text.
        largest_gap: largest distance of the logit of such a token from the highest logit.
        same_text: share of the prompts with the same tokens as plain decoding.
    """

    per_1000: float
    largest_gap: float
    same_text: float


@dataclass(frozen=True)
class Drift:
    """The difference of a verifier from the original target, on texts of the target.

    Attributes:
        perplexity: perplexity of the texts under the verifier.
        drift: mean KL(target ‖ verifier) in nats per token.
        drift_argmax_per_1000: positions, of 1,000, at which the most probable token differs.
    """

    perplexity: float
    drift: float
    drift_argmax_per_1000: float


@dataclass(kw_only=True)
class Exit:
    """The changes that learning made at an early exit, and the cost of a cycle there.

    Attributes:
        k: drafted tokens per cycle.
        accept_rate_before: accepted share of the verified drafts of the untrained exit.
        drift: difference of the verifier from the target.
        cost_of_a_cycle: duration of a cycle of the trained exit in plain steps, by part and as a whole.
        same_text: share of the prompts on which an arm emits what its verifier emits by plain decoding, by arm.
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
    """Arms that were measured side by side on the same prompts.

    Plain decoding and the best static setting are measured twice, so that the ratio of each to itself (the A/A check)
    shows the noise of the machine. The second measurement of an arm has its name with ``AGAIN`` after it.

    Attributes:
        first_try: earlier results on fewer prompts, in which the A/A check failed.
    """

    arms: Mapping[str, Compared]
    first_try: Comparison | None = None

    @property
    def again(self) -> dict[str, Interval]:
        """Every arm that was measured twice, over itself."""
        pairs = {name.removesuffix(AGAIN): row for name, row in self.arms.items() if name.endswith(AGAIN)}
        return {name: row.over[name] for name, row in pairs.items()}

    @property
    def agrees(self) -> bool:
        """True if the interval of every arm over itself contains 1."""
        return all(1 in found for found in self.again.values())

    @property
    def quiet(self) -> bool:
        """True if these intervals also lie within ±5 %. A wider one contains 1 because the machine was busy, and what
        was timed then is void."""
        found = self.again.values()
        return self.agrees and all(ratio.low >= 1 - QUIET and ratio.high <= 1 + QUIET for ratio in found)

    def twice(self, plain: str = "plain") -> str:
        """Return in words what the arms that were measured twice are over themselves; plain decoding may have another
        name."""
        return ", ".join(f"{plain if name == 'plain' else name} {ratio:.3f}" for name, ratio in self.again.items())

    def aa_check(self, plain: str = "plain") -> str:
        """Return the A/A check in a sentence."""
        found = f"A/A check (the same twice): {self.twice(plain)}"
        if self.quiet:
            return f"{found}: contains 1, within ±{100 * QUIET:.0f} %."
        if self.agrees:
            return f"{found}: wider than ±{100 * QUIET:.0f} %. TIMED ON A BUSY MACHINE OR ON TOO FEW PROMPTS, so these timings are void."
        return f"{found}: EXCLUDES 1. The arms were not timed under the same conditions, so these timings are void."


@dataclass(kw_only=True)
class Priced:
    """The same texts as in a timed table, with the same cycles, at the prices of a cost table.

    Attributes:
        arms: rows by name; other software has none, because its forwards are not known.
        costs: seconds of the target's and the drafter's forwards by rows.
        source: where the costs are from, in words.
    """

    arms: dict[str, Row]
    costs: dict[str, dict[int, float]]
    source: str


@dataclass(frozen=True)
class Verdict:
    """The verdict of a table on an arm.

    Attributes:
        over_static, low, high: its throughput over that of the best static setting, and the bounds of the 95 % interval;
            None where there is no static setting.
        over_plain: the same over plain decoding.
        void: True if the machine was too busy while the table was timed.
        reason: why it is void.
    """

    over_static: float | None
    low: float | None
    high: float | None
    over_plain: float | None
    void: bool
    reason: str | None = None

    @classmethod
    def of(cls, row: Row, reason: str | None) -> Verdict:
        """Return the verdict on the arm of a row; ``reason`` is why the table is void, or None."""
        static, plain = row.over.get("static"), row.over.get("plain")
        over_plain = plain.value if plain else None
        if static is None:
            return cls(None, None, None, over_plain, reason is not None, reason)
        return cls(static.value, static.low, static.high, over_plain, reason is not None, reason)


@dataclass(kw_only=True)
class Results(Comparison):
    """A table, and all figures that its notes and its picture need.

    Attributes:
        arms: rows by name.
        references: arms that the others are compared with.
        seconds: cost curves of this machine; None if nothing is timed.
        curves: the cost curves in words.
        actions: histograms of the learned arms' settings by task.
        decisions: name of the problem of each learned arm.
        by_task: tokens per second by arm and task.
        link: name of the link between edge and cloud.
        by_state: histograms of the learned arms' choices by state of the link.
        bytes_per_token: bytes sent up and down for each token, by arm.
        divergences: difference of each arm's texts from the target's own.
        others_text: share of the prompts on which other software emits the tokens of plain decoding.
        static: the best static setting.
        exit: figures of a run that trains an early exit.
        at_prices: the same texts at the prices of a cost table; None where no forward was timed in this process.
        over_best_single, over_fixed_order: the learned agent over the best static setting of any drafter and over the
            best fixed order of drafters, priced; None where the agent does not choose between drafters.
        replay_equals_live: there, whether random cycles of the recorded texts were the same live.
        switching: there, the arms on recorded texts whose domains come one after another, priced.
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
    at_prices: Priced | None = None
    over_best_single: Interval | None = None
    over_fixed_order: Interval | None = None
    replay_equals_live: bool | None = None
    switching: Priced | None = None
    first_try: Results | None = None

    def verdicts(self) -> dict[str, dict[str, Verdict]]:
        """Return what the table says about every arm, ``"live"`` as it was timed and ``"priced"`` at the prices of a cost
        table; one of the two is empty where there is only the other."""
        timed = self.machine.clock in (None, "wall")
        priced = (self.at_prices.arms if self.at_prices else {}) if timed else self.arms
        reason = None if self.quiet else self.aa_check()
        return {
            "live": {name: Verdict.of(row, reason) for name, row in (self.arms if timed else {}).items()},
            "priced": {name: Verdict.of(row, None) for name, row in priced.items()},
        }
