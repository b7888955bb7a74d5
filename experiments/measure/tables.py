"""Tables: all arms are measured side by side on held-out prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from spec_envs.controls import Policy
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.decoder import in_process
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.loading import DEFAULT_TARGET
from spec_envs.experiments.command import Announce
from spec_envs.experiments.measure.arms import Arm, Sample, decoded, run_arms
from spec_envs.experiments.measure.costs import describe
from spec_envs.experiments.measure.link_references import choices_by_state
from spec_envs.experiments.measure.live import encoded_prompts, local_decoder
from spec_envs.experiments.measure.machine import machine
from spec_envs.experiments.measure.price_list import prices
from spec_envs.experiments.measure.references import transformers_arms
from spec_envs.experiments.measure.results import AGAIN, Priced, Results
from spec_envs.experiments.measure.statistics import at_prices, by_task, divergence, same_text, summary, throughput
from spec_envs.experiments.reports.report import settings_played
from spec_envs.network.edge.linked import is_address
from spec_envs.prompts.rows import Split
from spec_envs.settings import Keywords

LOG = logging.getLogger(__name__)


def run_tables(
    policies: dict[str, Policy],
    env: Keywords,
    decoder: Engine,
    test_prompts: int,
    references: Sequence[str],
    learned: Sequence[str],
    others: dict[str, Arm] | None = None,
    costs: CostTable | None = None,
    announce: Announce = LOG.info,
    split: Split = "test",
) -> Results:
    """Measure plain decoding (twice), other software and the policies (the static one twice) side by side, and return the
    table.

    Args:
        references: names of the arms that all arms are compared with.
        learned: names of the policies whose choices are shown.
        others: arms of other software; by default transformers' ``generate``.
        costs: this machine's cost table, which also prices what is timed; by default the one that is measured here.
        announce: is told what is measured and about how long that takes.
        split: of the prompts.
    """
    samples = side_by_side(policies, env, decoder, test_prompts, others, announce, split)
    return tables(samples, policies, env, decoder, references, learned, costs)


def side_by_side(
    policies: dict[str, Policy],
    env: Keywords,
    decoder: Engine,
    test_prompts: int,
    others: dict[str, Arm] | None = None,
    announce: Announce = LOG.info,
    split: Split = "test",
) -> dict[str, list[Sample]]:
    """Return the samples of every arm of a table on the held-out prompts."""
    prompts = encoded_prompts(env, split, test_prompts)
    plain = decoder.plain()
    arms: dict[str, Arm] = {"plain": decoded(plain, None), "plain again": decoded(plain, None)}
    if not decoder.clock.priced and in_process(decoder):
        arms |= transformers_arms(env.get("target", DEFAULT_TARGET), decoder) if others is None else others
    decoders = []
    for name, policy in policies.items():
        for arm in (name, f"{name}{AGAIN}") if name == "static" and not decoder.clock.priced else (name,):
            decoders.append(policy.control.separate(decoder))
            arms[arm] = decoded(decoders[-1], policy)
    try:
        return run_arms(arms, prompts, env.get("max_new_tokens", 128), "held-out prompts", announce=announce)
    finally:
        for used in (plain, *decoders):
            used.close()


def tables(
    samples: dict[str, list[Sample]],
    policies: dict[str, Policy],
    env: Keywords,
    decoder: Engine,
    references: Sequence[str],
    learned: Sequence[str],
    costs: CostTable | None = None,
) -> Results:
    """Return the table of arms that were measured."""
    control = next(iter(policies.values())).control
    source, curves = "measured when the run began", None
    if not decoder.clock.priced and (in_process(decoder) or (control.link and not is_address(control.link))):
        if not costs:
            measured = decoder if in_process(decoder) else local_decoder(env, control)
            source, costs = "measured after these texts", prices(measured, env, control)
        curves = dict(costs.curves)
    results = Results(
        arms=summary(samples, compared(samples, references)),
        references=list(references),
        prompts=len(samples["plain"]),
        tasks=list(by_task(samples["plain"])),
        max_new_tokens=env.get("max_new_tokens", 128),
        temperature=decoder.temperature,
        machine=machine(decoder),
        seconds=curves,
        curves=describe(curves) if curves else None,
        actions={
            name: settings_played(policies[name].control, samples[name])
            for name in learned
            if policies[name].control.settings()
        },
        decisions={name: policies[name].control.name for name in learned},
        by_task={
            name: {task: throughput(group) for task, group in by_task(arm).items()} for name, arm in samples.items()
        },
    )
    if control.link:
        results.link = control.link
        if not is_address(control.link):
            results.by_state = {name: choices_by_state(control, samples[name]) for name in learned}
        results.bytes_per_token = {name: bytes_per_token(arm) for name, arm in samples.items()}
    if costs and curves:
        results.at_prices = priced(samples, references, costs, source)
    if not decoder.temperature:
        ours = {"plain", *policies}
        results.others_text = {
            name: same_text(arm, samples["plain"])
            for name, arm in samples.items()
            if name.removesuffix(AGAIN) not in ours
        }
    if in_process(decoder) and not decoder.temperature:
        results.divergences = {
            name: divergence(decoder, samples[name], samples["plain"]) for name in ("plain", *learned)
        }
    return results


def compared(samples: dict[str, list[Sample]], references: Sequence[str]) -> list[str]:
    """Return the arms that all arms are compared with: those that a table shows, random decisions, which the sentences
    above it mention, and the static setting, which is compared with itself."""
    return [*references, *(name for name in ("random", "static") if name in samples and name not in references)]


def priced(samples: dict[str, list[Sample]], references: Sequence[str], table: CostTable, source: str) -> Priced:
    """Return the same samples at the prices of a cost table, which is from ``source``, in words."""
    own = {name: [at_prices(s, table) for s in arm] for name, arm in samples.items() if all(s.forwards for s in arm)}
    shown = [reference for reference in compared(own, references) if reference in own]
    return Priced(arms=summary(own, shown), costs={"verify": table.verify, "draft": table.draft}, source=source)


def bytes_per_token(samples: Sequence[Sample]) -> list[float]:
    """Return the bytes sent up and down a link per token, ``[up, down]``."""
    tokens = sum(s.tokens for s in samples)
    return [sum(s.bytes_up for s in samples) / tokens, sum(s.bytes_down for s in samples) / tokens]
