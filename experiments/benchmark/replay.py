"""The part of the benchmark that is replayed from traces: references, trained arms and tuned arms."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spec_envs.controls import CONTROLS, Policy
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.benchmark.arms import GRIDS, Problem, samples_of, train, trained_policy, tuned
from spec_envs.experiments.benchmark.findings import FewTexts, Learned, OtherCosts, References, Tuned
from spec_envs.experiments.benchmark.problems import FEW, FOREIGN, LEARNED, LTD, Size
from spec_envs.experiments.benchmark.scale_out import mapped
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.measure.arms import Sample
from spec_envs.experiments.measure.bounds import Bounds
from spec_envs.experiments.measure.static import (
    best_alone,
    best_by_copies,
    best_lookup,
    best_of_pair,
    pair_control,
    seconds_of_pair,
    without_alternatives,
)
from spec_envs.experiments.measure.statistics import over_texts_and_seeds, throughput


class Static(NamedTuple):
    """The static settings that are best on training texts, with their seconds of each held-out text and the tokens of all
    texts.

    Attributes:
        setting: of all that the environment lets be decided.
        pair: of all that the pair of models offers, and of prompt lookup alone.
        copied: two lengths of chains, without a copy at the beginning and with one; None with its seconds where chains do
            not begin with copies.
    """

    setting: Sequence[Any]
    seconds: np.ndarray
    pair: Sequence[Any]
    pair_seconds: np.ndarray
    tokens: int
    copied: Sequence[int] | None = None
    copied_seconds: np.ndarray | None = None

    @property
    def per_token(self) -> float:
        return float(self.seconds.sum()) / self.tokens


def bounded(problem: Problem, trace: Trace, size: Size) -> tuple[Static, References]:
    """Return the best static settings, and the references that bound what agents can reach."""
    control, table = problem.control(), problem.table
    bounds, test = (
        Bounds(trace, control, table, trace.of_split(split), size.tokens) for split in ("train", size.held_out)
    )
    whole, held_out = (
        Bounds(trace, pair_control(control), table, trace.of_split(split), size.tokens)
        for split in ("train", size.held_out)
    )
    train_seconds, seconds, pair = bounds.static(), test.static(), best_of_pair(whole)
    best, own_best = bounds.best(train_seconds), bounds.best_by_task(train_seconds)
    copied, lookup = best_by_copies(whole), best_lookup(whole)
    static = Static(
        bounds.plans.names[best],
        seconds[:, best],
        pair,
        seconds_of_pair(held_out, pair),
        int(test.tokens.sum()),
        copied,
        None if copied is None else held_out.by_copies()[:, copied[0], copied[1]],
    )
    total = float(static.seconds.sum())
    alone, without = best_alone(trace, control, table, size.tokens), without_alternatives(control)
    slower = None
    if alone and without:
        plain_chains = Bounds(trace, without, table, trace.of_split(size.held_out), size.tokens)
        slower = total / float(plain_chains.static()[:, plain_chains.plans.names.index((alone[0],))].sum())
    per_task = sum(seconds[i, own_best.get(task, best)] for i, task in enumerate(test.tasks))
    return static, References(
        static=list(static.setting),
        pair=list(static.pair),
        pair_over_static=total / float(static.pair_seconds.sum()),
        static_over_plain=static.tokens * table.seconds("verify", 1) / total,
        per_task_over_static=total / per_task,
        alone=alone,
        alone_over_static=slower,
        lookup=lookup,
        lookup_over_static=total / float(held_out.by_lookup()[:, lookup[0]].sum()) if lookup else None,
        copied=copied,
        copied_over_static=None if static.copied_seconds is None else total / float(static.copied_seconds.sum()),
        clairvoyant=total / test.clairvoyant().sum(),
    )


class Arm(NamedTuple):
    """An arm that was replayed: its policy, its seconds of every held-out text ``[seeds, texts]``, and its row but for
    the ratios."""

    policy: Policy
    seconds: np.ndarray
    row: dict[str, Any]


def trained(problem: Problem, name: str, size: Size, folder: Path) -> dict[str, Arm]:
    """Train the arms that learn, and return them with the policy of the seed that is fastest on validation texts."""
    steps = {"ppo": size.steps or load_experiment(problem.env_id, "ppo").total_timesteps, LTD: size.ltd_steps}
    seeds = {LTD: min(size.ltd_seeds, size.seeds) if CONTROLS[problem.env_id].trace_kind == "tree" else 0}
    arms = [arm for arm in LEARNED if seeds.get(arm, size.seeds)]
    places = {LTD: Path(problem.prices).parent}  # its policies decide all of a tree, whatever else the problem is
    jobs = [
        (problem, arm, seed, steps.get(arm, 0), str(places.get(arm, folder) / f"{arm}-{seed}"))
        for arm in arms
        for seed in range(seeds.get(arm, size.seeds))
    ]
    made = mapped(train, jobs, f"training on {name}")
    found = {}
    for arm in arms:
        trainings = [note for job, note in zip(jobs, made, strict=True) if job[1] == arm]
        folders = [job[4] for job in jobs if job[1] == arm]
        validation, test = (
            [samples_of(problem, trained_policy(f, problem), split) for f in folders]
            for split in ("validation", size.held_out)
        )
        chosen = folders[int(np.argmax([throughput(samples) for samples in validation]))]
        row = {
            "train_seconds": float(np.median([training.seconds for training in trainings])),
            "forwards": trainings[0].forwards,
            "chosen": Path(chosen).name,
        }
        found[arm] = Arm(trained_policy(chosen, problem), np.array([seconds_of(samples) for samples in test]), row)
    return found


def ruled(problem: Problem, trace: Trace, size: Size) -> dict[str, Arm]:
    """Return the tuned rules."""
    found, test = {}, trace.of_split(size.held_out)
    for rule in GRIDS[problem.env_id]:
        policy, settings = tuned(problem, rule, size.tuning)
        turns, domains = (
            samples_of(problem, renewed(policy), size.held_out, texts)
            for texts in (test, one_domain_after_another(trace, test))
        )
        row = {"settings": settings, "by_domain": total_seconds(domains)}
        found[rule] = Arm(policy, np.array([seconds_of(turns)]), row)
    return found


def rows_of(arms: Mapping[str, Arm], static: Static) -> dict[str, Learned | Tuned]:
    """Return a row for every arm, over the static settings and over the fastest arm."""
    fastest = min(arms.values(), key=lambda arm: np.median(arm.seconds.sum(1))).seconds
    total = float(static.seconds.sum())
    found: dict[str, Learned | Tuned] = {}
    for name, arm in arms.items():
        ratio, over_pair, over_fastest = (
            over_texts_and_seeds(arm.seconds, other)
            for other in (static.seconds[None], static.pair_seconds[None], fastest)
        )
        own: dict[str, Any] = {"ratio": ratio, "over_pair": over_pair, "over_fastest": over_fastest}
        if static.copied_seconds is not None:
            own["over_copied"] = over_texts_and_seeds(arm.seconds, static.copied_seconds[None])
        if "settings" in arm.row:
            found[name] = Tuned(**own, settings=arm.row["settings"], by_domain=total / arm.row["by_domain"])
        else:
            found[name] = Learned(**own, **arm.row, seeds=(total / arm.seconds.sum(1)).tolist())
    return found


def seconds_of(samples: Sequence[Sample]) -> list[float]:
    """Return the seconds of each sample."""
    return [sample.seconds for sample in samples]


def renewed(policy: Policy) -> Policy:
    """Return a policy with a copy of the agent in its initial state, because some agents learn while they serve."""
    return Policy(policy.control, copy.deepcopy(policy.agent))


def one_domain_after_another(trace: Trace, texts: Sequence[int]) -> list[int]:
    """Return indices of texts, sorted by task."""
    return sorted(texts, key=lambda i: trace.texts[i].task)


def total_seconds(samples: Sequence[Sample]) -> float:
    """Return the seconds of all samples."""
    return sum(sample.seconds for sample in samples)


def other_costs(problem: Problem, trace: Trace, size: Size, folder: str) -> dict[str, OtherCosts]:
    """Measure hindsight, with the same weights, under cost tables that its training has not seen."""
    found = {}
    for name in FOREIGN:
        table, control = CostTable.load(name), problem.control()
        bounds, test = (
            Bounds(trace, control, table, trace.of_split(split), size.tokens) for split in ("train", size.held_out)
        )
        best = bounds.best(bounds.static())
        static = test.static()[:, best].sum()
        policy = trained_policy(folder, problem, foreign=table)
        seconds = total_seconds(samples_of(problem, policy, size.held_out, foreign=table))
        setting, clairvoyant = list(bounds.plans.names[best]), test.clairvoyant().sum()
        found[name] = OtherCosts(setting, static / seconds, static / clairvoyant)
    return found


def few_texts(problem: Problem, seconds_per_token: float, folder: Path, size: Size) -> list[FewTexts]:
    """Measure hindsight after training on the first few texts."""
    found = []
    for count in sorted({min(n, size.texts[0]) for n in FEW}):
        folders = [str(folder / f"hindsight-of-{count}-{seed}") for seed in range(min(3, size.seeds))]
        made = [train(problem, "hindsight", seed, 0, f, count) for seed, f in enumerate(folders)]
        rates = [throughput(samples_of(problem, trained_policy(f, problem), size.held_out)) for f in folders]
        found.append(FewTexts(count, made[0].forwards, float(np.mean(rates)) * seconds_per_token))
    return found
