"""The references of an agent that chooses between drafters: every drafter alone, the best fixed order, and rules that
learn while they decode. All of them are chosen on the training texts of a trace, under its cost table."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spec_envs.agents import AGENTS
from spec_envs.controls import Policy
from spec_envs.controls.drafter import DrafterControl
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.drafters.lookup import LONGEST
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.experiments.choosing.outcomes import Outcomes
from spec_envs.experiments.measure.arms import Encoded, Sample, decoded, run_arms
from spec_envs.experiments.measure.results import Best
from spec_envs.experiments.measure.statistics import throughput

GRIDS: dict[str, dict[str, Sequence[float]]] = {  # hyper-parameters that are tried on the training texts
    "hedge": {"rate": (0.1, 0.3, 1.0), "pace": (1.2, 1.6), "memory": (0.95, 0.98, 0.995)},
    "ucb-drafter": {"exploration": (0.01, 0.05, 0.2), "discount": (0.98, 0.995, 0.999)},
}


@dataclass(frozen=True)
class Setting:
    """The texts and prices on which the arms of a table are chosen, tuned and replayed.

    Attributes:
        trace: recorded texts of the control's drafters.
        table: prices of forwards.
        tokens: most new tokens of a text.
        static: the best choices on the training texts.
    """

    trace: PortfolioTrace
    control: DrafterControl
    table: CostTable
    tokens: int
    static: Best


def best_choices(trace: PortfolioTrace, control: DrafterControl, table: CostTable, max_new_tokens: int) -> Best:
    """Return the best static setting of a control, and the best fixed order of its drafters, on the training texts of a
    trace."""
    outcomes = Outcomes(trace, control, table, trace.of_split("train"), max_new_tokens)
    offered, tokens = [str(setting) for setting in control.settings()], int(outcomes.tokens.sum())
    rates = dict(zip(offered, (tokens / outcomes.static().sum(0)).tolist(), strict=True))
    best = max(rates, key=rates.__getitem__)
    return Best(best=[best], tokens_per_second=rates, fixed_order=best_order(trace, control, outcomes))


def alone(static: Best, control: DrafterControl) -> dict[str, str]:
    """Return the best setting of every drafter, by its name."""
    rates = static.tokens_per_second
    own = {name: [f"{name}:{size}" for size in control.sizes] for name in control.drafters}
    return {name: max(settings, key=rates.__getitem__) for name, settings in own.items()}


def best_order(trace: PortfolioTrace, control: DrafterControl, outcomes: Outcomes) -> dict[str, Any] | None:
    """Return the hyper-parameters of the best rule ``fixed-order`` on the texts of ``outcomes``, by trying all of them;
    None where no drafter copies alone."""
    offered = [str(setting) for setting in control.settings()]
    copiers = [name for name in control.drafters if not DrafterName.parse(name).model]
    copies = [f"{name}:{size}" for name in copiers for size in control.sizes]
    others = [setting for setting in offered if setting not in copies]
    orders = list(itertools.product(copies, range(1, LONGEST + 1), others))
    if not orders:
        return None
    matched = {name: np.asarray(trace.traces[name].columns["matched"]) for name in copiers}
    seconds = []
    for copier, group in itertools.groupby(orders, key=lambda order: order[0]):
        own = list(group)
        least, otherwise = np.array([match for _, match, _ in own]), [offered.index(other) for _, _, other in own]
        enough = matched[copier.rpartition(":")[0]][:, None] >= least
        seconds += outcomes.seconds(np.where(enough, offered.index(copier), otherwise)).sum(0).tolist()
    best = orders[int(np.argmin(seconds))]
    return dict(zip(("copier", "match", "otherwise"), best, strict=True))


def tuned(rule: str, setting: Setting) -> dict[str, Any]:
    """Return the hyper-parameters of a rule's grid that are fastest on the training texts."""
    grid = GRIDS[rule]
    tried = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    policies = {str(i): rule_of(rule, setting, given) for i, given in enumerate(tried)}
    samples = replayed(policies, setting, setting.trace.of_split("train"))
    return tried[int(max(policies, key=lambda name: throughput(samples[name])))]


def rule_of(rule: str, setting: Setting, given: dict[str, Any]) -> Policy:
    """Return the policy of a rule in its initial state."""
    return Policy(setting.control, AGENTS[rule](control=setting.control, **given))


def replayed(
    policies: dict[str, Policy], setting: Setting, texts: Sequence[int], plain: bool = False
) -> dict[str, list[Sample]]:
    """Replay texts of the trace under policies, and return the samples of each; ``plain`` adds plain decoding under that
    name."""
    trace = setting.trace
    prompts = [Encoded(trace.texts[i].task, trace.texts[i].prompt) for i in texts]
    decoder = trace.decoder(setting.control, PricedClock(setting.table))
    arms = {name: decoded(decoder, policy) for name, policy in policies.items()}
    if plain:
        arms = {"plain": decoded(decoder.plain(), None), **arms}
    return run_arms(arms, prompts, setting.tokens, "", quiet=True)
