"""The benchmark's findings on a problem, as benchmark.json holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from spec_envs.experiments.benchmark.problems import Size
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.machine import Machine
from spec_envs.experiments.measure.results import Interval, Results


@dataclass(frozen=True)
class OverStatic:
    """Live throughput over the best static setting's, with the bounds of its 95 % interval."""

    over_static: float
    low: float
    high: float

    @property
    def interval(self) -> Interval:
        return Interval(self.over_static, self.low, self.high)


@dataclass(kw_only=True)
class Learned:
    """An arm that is trained: its throughput over the best static setting's when replayed.

    Attributes:
        ratio: interquartile mean over the seeds, with its interval.
        seeds: the ratio of each seed.
        train_seconds: median over the seeds.
        forwards: of the target that the same training takes live.
        chosen: folder of the seed that is fastest on validation texts.
    """

    ratio: Annotated[Interval, Inline()]
    seeds: list[float]
    train_seconds: float
    forwards: int
    chosen: str

    @property
    def value(self) -> float:
        return self.ratio.value


@dataclass(kw_only=True)
class Tuned:
    """A published rule: its best settings, and its throughput over the best static setting's when replayed, on texts
    that come from the tasks in turn (``value``) and task by task (``by_domain``)."""

    settings: dict[str, Any]
    value: float
    by_domain: float


@dataclass(frozen=True)
class FewTexts:
    """Hindsight after so many training texts, whose recording took so many forwards of the target."""

    texts: int
    forwards: int
    value: float


@dataclass(frozen=True)
class OtherCosts:
    """Hindsight and the clairvoyant optimum under a cost table not seen in training, over that table's best static
    setting."""

    static: list[Any]
    over_static: float
    clairvoyant: float


@dataclass(frozen=True)
class Equality:
    """Replayed against live cycles: how many, with another accepted length, the same at marked ties; and priced over
    timed seconds."""

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
    """Seconds of recording a position, and of a live cycle that drafts and verifies as much as is offered."""

    position_seconds: float
    full_cycle_seconds: float


@dataclass(frozen=True)
class Checks:
    """The costs of a machine, and the agreement of replay and live decoder."""

    costs: dict[str, dict[int, float]]
    machine: Machine
    replay_equals_live: Equality
    speeds: Annotated[Speeds, Inline()]
    recording: RecordingCost


@dataclass(frozen=True)
class References:
    """The best static setting S*, and what is to be had beyond it: throughput over S* of the best static setting of
    each task, of the clairvoyant optimum, and of the best policy of what an agent sees that was found."""

    static: list[Any]
    static_over_plain: float
    per_task_over_static: float
    clairvoyant: float
    informed: float


@dataclass(kw_only=True)
class Findings:
    """Everything about one problem.

    Attributes:
        replay: arms on held-out texts that are replayed.
        gap_share: share of the gap from S* to the clairvoyant optimum that hindsight closes.
        of_informed: hindsight's throughput over the informed optimum's.
        tasks: hindsight over S*, by task.
        live: the table of held-out prompts decoded live; ``arms`` has its ratios to S*.
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
    of_informed: float
    live: Results
    arms: dict[str, OverStatic]
    sampled: dict[str, OverStatic]

    @property
    def learned(self) -> dict[str, Learned]:
        """The arms that were trained."""
        return {name: row for name, row in self.replay.items() if isinstance(row, Learned)}
