"""The table of a run of SpecDrafter-v0: the agent beside every drafter alone, the best fixed order, rules that learn while
they decode, `hindsight`, and the clairvoyant optimum."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from spec_envs import agents, recordings
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.agents.traced.hindsight import HindsightAgent
from spec_envs.controls import Policy
from spec_envs.controls.drafter import DrafterControl
from spec_envs.decoding.clock import PricedClock, WallClock
from spec_envs.decoding.decoder import in_process
from spec_envs.decoding.drafters.portfolio import SEPARATOR
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.experiments.choosing.equality import replay_equals_live
from spec_envs.experiments.choosing.outcomes import Outcomes
from spec_envs.experiments.choosing.references import GRIDS, Setting, alone, best_choices, replayed, rule_of, tuned
from spec_envs.experiments.command import STATIC, TABLE, Stages
from spec_envs.experiments.measure.arms import Sample
from spec_envs.experiments.measure.encoding import load, to_json
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.experiments.measure.machine import machine
from spec_envs.experiments.measure.price_list import kept
from spec_envs.experiments.measure.results import Best, Priced, Results, Row
from spec_envs.experiments.measure.statistics import at_prices, summary, with_aa_check
from spec_envs.experiments.measure.tables import side_by_side, tables
from spec_envs.experiments.traces.plan import TEXTS, Plan
from spec_envs.experiments.traces.record import recorded_by_default
from spec_envs.sealed import write_sealed
from spec_envs.settings import Keywords
from spec_envs.vector.env import ReplayVectorEnv

ENVS = 64  # environments in NumPy that hindsight learns from
ORDER, CLAIRVOYANT = "fixed order", "clairvoyant"
REFERENCES = ["plain", "static", ORDER]


def evaluate_choice(
    policy: Policy, run: Path, env: Keywords, chosen: Path | None, test_prompts: int, stages: Stages
) -> Results:
    """Return the table of a run that chooses between drafters.

    All references are chosen, tuned and trained on the training texts of the run's trace under its cost table, which
    also prices what is timed. The trace is recorded if there is none.

    Args:
        policy: policy of the run.
        run: folder of the run.
        env: keyword arguments of the environment.
        chosen: file that keeps the best choices; None to choose them again.
        stages: of the command.
    """
    config, control = agents.read_config(run), cast(DrafterControl, policy.control)
    name, decoder = config["agent"], decoder_for(env, control)
    stages.begin(STATIC, "choosing the best drafter and size, and the best fixed order, on the recorded training texts")
    trace = trace_of(run, config, env)
    clock = decoder.clock
    table = clock.table if isinstance(clock, PricedClock) else kept(run, machine(decoder)) or trace.costs()
    control.costs = table
    tokens = int(env.get("max_new_tokens") or trace.max_new_tokens)
    static = kept_choices(chosen, lambda: best_choices(trace, control, table, tokens))
    setting = Setting(trace, control, table, tokens, static)
    policies = references(setting, int(config["seed"])) | {name: policy}

    def fresh() -> dict[str, Policy]:  # because some agents learn while they decode
        return {arm: Policy(own.control, copy.deepcopy(own.agent)) for arm, own in policies.items()}

    def measure(count: int) -> Results:
        used = [reference for reference in REFERENCES if reference in ("plain", *policies)]
        samples = side_by_side(fresh(), env, decoder, count, announce=partial(stages.begin, TABLE))
        found = replace(tables(samples, policies, env, decoder, used, [name], table), static=static)
        rows = found.arms
        if found.at_prices:
            rows = found.at_prices.arms
            samples = {arm: [at_prices(one, table) for one in own] for arm, own in samples.items() if arm in rows}
        rows |= bounded(samples, setting)
        found.over_best_single, found.over_fixed_order = (rows[name].over.get(other) for other in ("static", ORDER))
        return found

    results = with_aa_check(measure, test_prompts)
    if in_process(decoder):
        decoder.clock = WallClock(decoder.device)  # which counts forwards
        results.replay_equals_live = replay_equals_live(setting, decoder)
    results.switching = switching(fresh(), setting)
    return results


def trace_of(run: Path, config: Mapping[str, Any], env: Keywords) -> PortfolioTrace:
    """Return the trace that a run has learned from, or one like it.

    Raises:
        ValueError: the trace is of one drafter.
    """
    given = env.get("trace") or config["env"].get("trace")
    if given:
        found = recordings.exact(given)
    else:
        train, validation, test = config.get("record") or TEXTS
        own = {key: value for key, value in env.items() if key not in ("trace", "clock")}
        found = recorded_by_default(Plan(config["id"], own, (train, validation, test)), run.parents[1])
    if not isinstance(found, PortfolioTrace):
        raise ValueError(
            f"the trace {found.folder} is of one drafter; give one that `spec-envs trace SpecDrafter-v0` made"
        )
    return found


def kept_choices(file: Path | None, choose: Callable[[], Best]) -> Best:
    """Return the best choices, read from a file if it has them; without a file they are not kept."""
    if file and file.exists():
        return load(Best, file, "delete it to choose again")
    found = choose()
    if file:
        write_sealed(file, to_json(found))
    return found


def references(setting: Setting, seed: int) -> dict[str, Policy]:
    """Return the policies that the agent is compared with, by name."""
    control, static = setting.control, setting.static
    best = str(static.best[0])
    singles = [choice for choice in alone(static, control).values() if choice != best]
    fixed = {choice: Policy(control, FixedAgent(control, value=choice)) for choice in singles}
    found = {
        "random": Policy(control, RandomAgent(control, seed=0)),
        "static": Policy(control, FixedAgent(control, value=best)),
        **fixed,
    }
    if static.fixed_order:
        found[ORDER] = rule_of("fixed-order", setting, static.fixed_order)
    for rule in GRIDS:
        found[rule] = rule_of(rule, setting, tuned(rule, setting))
    return found | {"hindsight": learned(setting, seed)}


def learned(setting: Setting, seed: int) -> Policy:
    """Return the policy of `hindsight`, which learns from the training texts within seconds."""
    trace, control = setting.trace, setting.control
    keywords: Keywords = {"target": trace.manifest.target, "drafter": SEPARATOR.join(trace.traces)}
    keywords |= {name: getattr(control, name) for name in ("sizes", "depths", "width", "cost_features")}
    env = ReplayVectorEnv(control.env_id, ENVS, trace=str(trace.folder), max_new_tokens=setting.tokens, **keywords)
    env.price([setting.table])
    agent = HindsightAgent(control=control, seed=seed).learn(0, env)
    agent.decision_seconds = agent.priced_seconds
    return Policy(control, agent)


def bounded(samples: Mapping[str, Sequence[Sample]], setting: Setting) -> dict[str, Row]:
    """Return the row of the clairvoyant optimum on the texts of other arms' samples; none if one of them was not
    recorded.

    Args:
        samples: priced samples of the arms that rows are compared with.
    """
    found, plain = setting.trace.by_prompt, samples["plain"]
    texts = [found.get(tuple(sample.prompt.ids)) for sample in plain]
    known = [text for text in texts if text is not None]
    if len(known) < len(texts):
        return {}
    outcomes = Outcomes(setting.trace, setting.control, setting.table, known, setting.tokens)
    best = [
        replace(sample, seconds=way.seconds, cycles=len(way.actions), accepted=way.accepted, verified=way.verified)
        for sample, way in zip(plain, outcomes.clairvoyant(), strict=True)
    ]
    compared = {name: list(samples[name]) for name in REFERENCES if name in samples}
    return {CLAIRVOYANT: summary({CLAIRVOYANT: best, **compared}, list(compared))[CLAIRVOYANT]}


def switching(policies: dict[str, Policy], setting: Setting) -> Priced:
    """Return the arms on the recorded test texts, those of each domain one after another."""
    trace, table = setting.trace, setting.table
    texts = sorted(trace.of_split("test"), key=lambda i: trace.texts[i].task)
    samples = replayed(policies, setting, texts, plain=True)
    references = [name for name in REFERENCES if name in samples]
    rows = summary(samples, references) | bounded(samples, setting)
    return Priced(arms=rows, costs={"verify": table.verify, "draft": table.draft}, source="one domain after another")
