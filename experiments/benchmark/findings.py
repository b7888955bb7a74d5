"""The benchmark's findings on its problems, as adaptive-control.json holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from spec_envs.experiments.benchmark.problems import Size
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.machine import Machine
from spec_envs.experiments.measure.results import Interval, Results


@dataclass(frozen=True)
class OverStatic:
    """The ratio of a live throughput to that of the best static setting, and the bounds of its 95 % interval."""

    over_static: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        return Interval(self.over_static, self.low, self.high)


@dataclass(kw_only=True)
class Learned:
    """A trained arm, replayed on held-out texts: the ratio of its throughput to that of the best static setting.

    Attributes:
        ratio: interquartile mean over the seeds, with its interval over texts and seeds.
        over_pair, over_fastest: the same over the best static setting of the pair of models, and over the fastest arm.
        over_copied: the same over the best two lengths of chains that may begin with copies; None without these.
        seeds: the ratio of each seed.
        train_seconds: median duration of the training over the seeds.
        forwards: forwards of the target that the same training takes live.
        chosen: name of the folder of the seed that is fastest on validation texts.
    """

    ratio: Annotated[Interval, Inline()]
    seeds: list[float]
    train_seconds: float
    forwards: int
    chosen: str
    over_pair: Interval
    over_fastest: Interval
    over_copied: Interval | None = None

    @property
    def value(self) -> float:
        return self.ratio.value


@dataclass(kw_only=True)
class Tuned:
    """A tuned rule, replayed on held-out texts: the ratio of its throughput to that of the best static setting.

    Attributes:
        settings: best hyper-parameters of the rule.
        ratio: the ratio if the tasks take turns, with its interval over texts.
        over_pair, over_fastest, over_copied: see ``Learned``.
        by_domain: the ratio if all texts of a task come one after another.
    """

    settings: dict[str, Any]
    ratio: Annotated[Interval, Inline()]
    by_domain: float
    over_pair: Interval
    over_fastest: Interval
    over_copied: Interval | None = None

    @property
    def value(self) -> float:
        return self.ratio.value


@dataclass(frozen=True)
class FewTexts:
    """Hindsight after training on ``texts`` texts, whose recording took ``forwards`` forwards of the target."""

    texts: int
    forwards: int
    value: float


@dataclass(frozen=True)
class OtherCosts:
    """Hindsight and the clairvoyant optimum under a cost table that training has not seen, over the best static setting
    under that table."""

    static: list[Any]
    over_static: float
    clairvoyant: float


@dataclass(frozen=True)
class Equality:
    """The comparison of replayed with live cycles.

    Attributes:
        cycles: number of cycles that were compared.
        mismatches: cycles with other tokens, except those at near-ties of the target.
        ties: cycles with other tokens at near-ties of the target.
        priced_over_timed: priced seconds of the replay over timed seconds of the live decoding.
    """

    cycles: int
    mismatches: int
    ties: int
    priced_over_timed: float


@dataclass(frozen=True)
class Speeds:
    """Environment steps per second: live, and replayed in NumPy on one core."""

    live_steps_per_s: float
    replay_steps_per_s: float
    replay_over_live: float


@dataclass(frozen=True)
class RecordingCost:
    """Seconds of recording a position, and of a live cycle that drafts and verifies as much as possible."""

    position_seconds: float
    full_cycle_seconds: float


@dataclass(frozen=True)
class Checks:
    """The costs of forwards on a machine, and the checks of a trace."""

    costs: dict[str, dict[int, float]]
    machine: Machine
    replay_equals_live: Equality
    speeds: Annotated[Speeds, Inline()]
    recording: RecordingCost


@dataclass(frozen=True)
class References:
    """The best static setting S*, and the throughputs over S* that bound what agents can reach.

    Attributes:
        static: values of S*, of all that the environment lets be decided.
        pair: the best static setting of the pair of models, of all depths and budgets, or chain lengths, or ``lookup:K``
            where chains of K tokens by prompt lookup alone are faster on training texts.
        pair_over_static: what that one makes.
        copied, copied_over_static: the best two lengths of chains, of cycles whose first token the draft model drafts and
            of those whose first token is a copy, and what they make; None where chains do not begin with copies.
        alone, alone_over_static: the best chain length without the alternatives that are verified beside chains, and what it
            makes; None where there are none.
        lookup, lookup_over_static: the best chain length of prompt lookup alone, and what it makes; None where it is the
            drafter itself.
        per_task_over_static: the best static setting of each task.
        clairvoyant: the clairvoyant optimum.
    """

    static: list[Any]
    static_over_plain: float
    per_task_over_static: float
    clairvoyant: float
    pair: list[Any]
    pair_over_static: float
    copied: list[int] | None = None
    copied_over_static: float | None = None
    alone: list[int] | None = None
    alone_over_static: float | None = None
    lookup: list[int] | None = None
    lookup_over_static: float | None = None


@dataclass(kw_only=True)
class Findings:
    """All findings on one problem.

    Attributes:
        settings: sizes that they were measured with.
        replay: arms that were replayed on held-out texts.
        gap_share: share of the gap from S* to the clairvoyant optimum that hindsight closes.
        tasks: hindsight over S*, by task.
        live: the table of held-out prompts that were decoded live.
        arms: ratios of the live table to S*.
        sampled: the same ratios at temperature 1.
    """

    settings: Size
    checks: Annotated[Checks, Inline()]
    references: Annotated[References, Inline()]
    replay: dict[str, Learned | Tuned]
    hindsight_train_s: float
    other_costs: dict[str, OtherCosts]
    few_texts: list[FewTexts]
    tasks: dict[str, float]
    gap_share: float
    live: Results
    arms: dict[str, OverStatic]
    sampled: dict[str, OverStatic]

    @property
    def learned(self) -> dict[str, Learned]:
        """The arms that were trained."""
        return {name: row for name, row in self.replay.items() if isinstance(row, Learned)}


@dataclass(kw_only=True)
class Benchmark:
    """The findings on every problem.

    Attributes:
        fast: True for the small version.
        final_uses: how often the final split was used, this use included; None where the held-out texts are others.
    """

    problems: dict[str, Findings]
    fast: bool
    final_uses: int | None = None
