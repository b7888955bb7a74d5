"""The part of the benchmark that is replayed from traces: references, trained arms and tuned arms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap, trim_mean

from spec_envs.controls import Policy
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.benchmark.arms import GRIDS, Problem, informed, samples_of, train, trained_policy, tuned
from spec_envs.experiments.benchmark.findings import FewTexts, Learned, OtherCosts, References, Tuned
from spec_envs.experiments.benchmark.problems import FEW, FOREIGN, LEARNED, Size
from spec_envs.experiments.benchmark.scale_out import mapped
from spec_envs.experiments.measure.arms import Sample
from spec_envs.experiments.measure.bounds import Bounds
from spec_envs.experiments.measure.results import Interval
from spec_envs.experiments.measure.statistics import throughput


class Static(NamedTuple):
    """The static setting that is best on training texts, with its seconds of each held-out text and the tokens of
    all."""

    setting: Sequence[Any]
    seconds: np.ndarray
    tokens: int

    @property
    def per_token(self) -> float:
        return float(self.seconds.sum()) / self.tokens


def bounded(problem: Problem, trace: Trace, table: CostTable, size: Size) -> tuple[Static, References]:
    """Return the best static setting S*, and the references that bound what agents can reach."""
    control = problem.control()
    bounds, test = (Bounds(trace, control, table, trace.of_split(split), size.tokens) for split in ("train", "test"))
    train_seconds, seconds = bounds.static(), test.static()
    best, own_best = bounds.best(train_seconds), bounds.best_by_task(train_seconds)
    static = Static(bounds.plans.names[best], seconds[:, best], int(test.tokens.sum()))
    total = float(static.seconds.sum())
    per_task = sum(seconds[i, own_best.get(task, best)] for i, task in enumerate(test.tasks))
    return static, References(
        static=list(static.setting),
        static_over_plain=static.tokens * table.seconds("verify", 1) / total,
        per_task_over_static=total / per_task,
        clairvoyant=total / test.clairvoyant().sum(),
        informed=total / total_seconds(informed(problem, table, size.folds)),
    )


def trained(
    problem: Problem, name: str, table: CostTable, static: Static, size: Size, folder: Path
) -> tuple[dict[str, Policy], dict[str, Learned]]:
    """Train the arms that learn. Return for each the policy of the seed that is fastest on validation texts, and a row
    over all seeds."""
    steps = {"ppo": size.steps, "ltd": size.ltd_steps}
    arms = [arm for arm in LEARNED if arm != "ltd" or problem.env_id != "SpecK-v0"]
    jobs = [
        (problem, arm, seed, steps.get(arm, 0), str(folder / f"{arm}-{seed}"))
        for arm in arms
        for seed in range(size.seeds)
    ]
    made = mapped(train, jobs, f"training on {name}")
    policies, rows = {}, {}
    for arm in arms:
        trainings = [note for job, note in zip(jobs, made, strict=True) if job[1] == arm]
        folders = [job[4] for job in jobs if job[1] == arm]
        validation, rates = (
            [throughput(samples_of(problem, trained_policy(f, table), split, table)) for f in folders]
            for split in ("validation", "test")
        )
        chosen = folders[int(np.argmax(validation))]
        policies[arm] = trained_policy(chosen, table)
        ratios = np.array(rates) * static.per_token
        rows[arm] = Learned(
            ratio=over_seeds(ratios),
            seeds=ratios.tolist(),
            train_seconds=float(np.median([training.seconds for training in trainings])),
            forwards=trainings[0].forwards,
            chosen=Path(chosen).name,
        )
    return policies, rows


def ruled(
    problem: Problem, trace: Trace, table: CostTable, static: Static, size: Size
) -> tuple[dict[str, Policy], dict[str, Tuned]]:
    """Return the policies of the tuned rules, and a row for each."""
    policies: dict[str, Policy] = {}
    rows, test = {}, trace.of_split("test")

    def over_static(rule: str, texts: Sequence[int]) -> float:
        return throughput(samples_of(problem, renewed(policies[rule]), "test", table, texts)) * static.per_token

    for rule in GRIDS[problem.env_id]:
        policies[rule], settings = tuned(problem, rule, table, size.tuning)
        by_task = one_domain_after_another(trace, test)
        rows[rule] = Tuned(settings=settings, value=over_static(rule, test), by_domain=over_static(rule, by_task))
    return policies, rows


def renewed(policy: Policy) -> Policy:
    """Return a policy with a copy of the agent in its initial state, because some agents learn while they serve."""
    return Policy(policy.control, copy.deepcopy(policy.agent))


def one_domain_after_another(trace: Trace, texts: Sequence[int]) -> list[int]:
    """Return indices of texts, sorted by task."""
    return sorted(texts, key=lambda i: trace.texts[i].task)


def total_seconds(samples: Sequence[Sample]) -> float:
    """Return the seconds of all samples."""
    return sum(sample.seconds for sample in samples)


def over_seeds(ratios: np.ndarray) -> Interval:
    """Return the interquartile mean over seeds with its 95 % bootstrap interval."""
    value = float(trim_mean(ratios, 0.25))
    if len(ratios) < 3 or np.ptp(ratios) == 0:
        return Interval(value, float(ratios.min()), float(ratios.max()))
    interval = bootstrap(
        (ratios,), lambda x, axis: trim_mean(x, 0.25, axis=axis), n_resamples=2000, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(value, float(interval.low), float(interval.high))


def other_costs(problem: Problem, trace: Trace, size: Size, folder: str) -> dict[str, OtherCosts]:
    """Measure hindsight, with the same weights, under cost tables that its training has not seen."""
    found = {}
    for name in FOREIGN:
        table, control = CostTable.load(name), problem.control()
        bounds, test = (
            Bounds(trace, control, table, trace.of_split(split), size.tokens) for split in ("train", "test")
        )
        best = bounds.best(bounds.static())
        static = test.static()[:, best].sum()
        seconds = total_seconds(samples_of(problem, trained_policy(folder, table), "test", table))
        setting, clairvoyant = list(bounds.plans.names[best]), test.clairvoyant().sum()
        found[name] = OtherCosts(setting, static / seconds, static / clairvoyant)
    return found


def few_texts(problem: Problem, table: CostTable, seconds_per_token: float, folder: Path, size: Size) -> list[FewTexts]:
    """Measure hindsight after training on the first few texts."""
    found = []
    for count in sorted({min(n, size.texts[0]) for n in FEW}):
        folders = [str(folder / f"hindsight-of-{count}-{seed}") for seed in range(min(3, size.seeds))]
        made = [train(problem, "hindsight", seed, 0, f, count) for seed, f in enumerate(folders)]
        rates = [throughput(samples_of(problem, trained_policy(f, table), "test", table)) for f in folders]
        found.append(FewTexts(count, made[0].forwards, float(np.mean(rates)) * seconds_per_token))
    return found
