"""The best static setting, chosen on training prompts: one value for each axis of the problem, used in every cycle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spec_envs.agents.baselines.copy_k import CopyKAgent
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.controls import Control, Policy
from spec_envs.controls.base import Setting
from spec_envs.controls.candidates import START
from spec_envs.controls.k import KControl, chains_of
from spec_envs.controls.tree import TreeControl
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.decoder import in_process
from spec_envs.decoding.drafters.names import LOOKUP, DrafterName
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.command import about
from spec_envs.experiments.measure import link_references
from spec_envs.experiments.measure.arms import decoded, run_arms
from spec_envs.experiments.measure.bounds import Bounds
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts
from spec_envs.experiments.measure.lookup import lookup_policy
from spec_envs.experiments.measure.price_list import prices
from spec_envs.experiments.measure.results import Best, looked_up
from spec_envs.experiments.measure.statistics import throughput
from spec_envs.experiments.reports.report import setting_name
from spec_envs.settings import Keywords

PROMPTS, TOKENS = 13, 48  # training prompts on which settings are tried, one of every shipped set, and tokens of each


def static_policy(control: Control, values: Sequence[Setting]) -> Policy:
    """Return the policy that uses one value for each axis of ``control.candidates()`` in every cycle."""
    pinned, setting = control.static(*values)
    return Policy(pinned, FixedAgent(pinned, value=setting))


def static_chain(k: int, k_max: int = 16) -> Policy:
    """Return the policy that drafts and verifies ``k`` tokens, and no alternatives, in every cycle."""
    return static_policy(KControl(k_max, alternatives=0), (k,))


def policy_by_copies(control: Control, lengths: Sequence[int]) -> Policy:
    """Return the policy that drafts the first length in cycles whose first token the draft model drafts, and the second
    one in those whose first token is a copy; ``control`` is of the same chains."""
    by_token = chains_of(control, decision="token")
    k, k_copied = lengths
    return Policy(by_token, CopyKAgent(by_token, k=k, k_copied=k_copied))


def best_static(env: Keywords, control: Control, costs: CostTable | None = None) -> Best:
    """Find the fastest static setting of a problem by coordinate search: all values of every axis are tried while the
    other axes keep their best values so far, until no axis moves.

    Args:
        env: keyword arguments of the environment.
        costs: this machine's cost table, which prices the search in place of a measured clock; by default it is measured.
    """
    if control.link:
        return link_references.best_choices(env, control, costs)
    axes = control.candidates()
    best = tuple(START[name] if START.get(name) in values else values[0] for name, values in axes.items())
    rates: dict[tuple[Setting, ...], float] = {}
    search = Search(env, control, costs)
    while True:
        line = [(*best[:i], value, *best[i + 1 :]) for i, values in enumerate(axes.values()) for value in values]
        new = list(dict.fromkeys(values for values in line if values not in rates))
        if new:
            rates |= search.rates({values: static_policy(control, values) for values in new})
        ordered = sorted(rates)
        leader = max(ordered, key=rates.__getitem__)
        if leader == best or not new:
            tried = {setting_name(values, list(axes)): rates[values] for values in ordered}
            return Best(best=list(leader), tokens_per_second=tried)
        best = leader


def best_recorded(trace: Trace, control: Control, table: CostTable, max_new_tokens: int) -> Best:
    """Return the static setting of a control that is fastest on the training texts of a trace, of all that it offers, and
    the one of the pair of models, of all depths and budgets of a tree or of all lengths of a chain, drafted as recorded or
    by prompt lookup alone; where chains may begin with copies, also the best two lengths."""
    texts, pair = trace.of_split("train"), pair_control(control)
    own, whole = (Bounds(trace, each, table, texts, max_new_tokens) for each in (control, pair))
    rates = own.throughput(own.static())
    axes = list(control.candidates())
    tried = {
        setting_name(name, axes): float(rate) for name, rate in zip(own.plans.names, rates, strict=True) if rate > 0
    }
    best = own.plans.names[int(rates.argmax())]
    return Best(
        best=list(best),
        tokens_per_second=tried,
        pair=best_of_pair(whole),
        copied=best_by_copies(own),
        alone=best_alone(trace, control, table, max_new_tokens),
        lookup=best_lookup(whole),
    )


def best_of_pair(bounds: Bounds) -> list[Setting]:
    """Return the setting that is fastest over all texts, of all that the control of a pair offers and of prompt lookup
    alone, whose chains of K tokens are the setting ``lookup:K``."""
    drafted, lookup = bounds.static(), best_lookup(bounds)
    best = bounds.best(drafted)
    if lookup and bounds.by_lookup()[:, lookup[0]].sum() < drafted[:, best].sum():
        return [f"{LOOKUP}:{lookup[0]}"]
    return list(bounds.plans.names[best])


def seconds_of_pair(bounds: Bounds, setting: Sequence[Setting]) -> np.ndarray:
    """Return the seconds ``[texts]`` of every text under a setting of ``best_of_pair``."""
    if (k := looked_up(setting)) is not None:
        return bounds.by_lookup()[:, k]
    return bounds.static()[:, [list(name) for name in bounds.plans.names].index([*map(int, setting)])]


def pair_policy(control: Control, setting: Sequence[Setting]) -> Policy:
    """Return the policy that uses a setting of ``best_of_pair`` in every cycle; ``control`` is of the same drafts."""
    k = looked_up(setting)
    return static_policy(pair_control(control), setting) if k is None else lookup_policy(k)


def best_lookup(bounds: Bounds) -> list[int] | None:
    """Return the chain length that is fastest over all texts if prompt lookup alone drafts; None where it is the drafter
    that was recorded."""
    if bounds.trace.manifest.drafter == LOOKUP:
        return None
    return [bounds.best(bounds.by_lookup())]


def best_alone(trace: Trace, control: Control, table: CostTable, max_new_tokens: int) -> list[int] | None:
    """Return the chain length that is fastest on the training texts of a trace if no alternatives are verified beside it;
    None where none are."""
    without = without_alternatives(control)
    if without is None:
        return None
    bounds = Bounds(trace, without, table, trace.of_split("train"), max_new_tokens)
    return list(bounds.plans.names[bounds.best(bounds.static())])


def without_alternatives(control: Control) -> Control | None:
    """Return the control of the same chains without the alternatives beside them; None where there are none."""
    return chains_of(control, alternatives=0, observation="counters") if control.alternatives else None


def best_by_copies(bounds: Bounds) -> list[int] | None:
    """Return the two lengths of chains that are fastest over all texts: of cycles whose first token the draft model
    drafts, and of those whose first token is a copy. None for trees, and where not both happens."""
    drafter = DrafterName.parse(bounds.trace.manifest.drafter)
    if not (bounds.plans.chain and drafter.copies and drafter.model):
        return None
    seconds = bounds.by_copies().sum(0)
    return [int(length) for length in np.unravel_index(seconds.argmin(), seconds.shape)]


def weighable(control: Control) -> bool:
    """Return True if every static setting of a control has a price on a trace."""
    try:
        control.plans().settled()
    except ValueError:
        return False
    return True


def pair_control(control: Control) -> Control:
    """Return the control of the same drafts whose static settings are all that the pair of models offers."""
    if control.width == 1:
        return chains_of(control, observation="counters")
    return TreeControl(control.max_depth, control.width)


def search_in_words(env: Keywords, control: Control, costs: CostTable | None, recorded: bool = False) -> str:
    """Return what a search of the best static setting does, and about how long it takes if texts are decoded for it and
    not ``recorded``."""
    doing = "choosing the best fixed setting, which the agent has to beat, on training prompts"
    if costs is None or recorded:
        return doing
    if control.link:
        texts, tokens = len(control.settings()) * link_references.PROMPTS, link_references.TOKENS
    else:
        texts, tokens = sum(map(len, control.candidates().values())) * PROMPTS, TOKENS
    seconds = texts * min(tokens, env.get("max_new_tokens", tokens)) * costs.seconds("verify", 1)
    return f"{doing} ({about(seconds)})"


class Search:
    """Tries settings on training prompts.

    In place of a measured clock, a cost table of this machine prices the search, so that other load on the machine does
    not influence the choice (a server is timed live). The chosen setting is later measured live.
    """

    def __init__(self, env: Keywords, control: Control, costs: CostTable | None):
        self.decoder = decoder_for(env, control)
        if not self.decoder.clock.priced and in_process(self.decoder):
            self.decoder.clock = PricedClock(costs or prices(self.decoder, env, control))
        self.prompts = encoded_prompts(env, "train", PROMPTS)
        self.tokens = min(TOKENS, env.get("max_new_tokens", TOKENS))

    def rates(self, policies: dict[tuple[Setting, ...], Policy]) -> dict[tuple[Setting, ...], float]:
        """Return the tokens per second of each policy."""
        decoders = {setting: self.decoder.separate() for setting in policies}
        arms = {str(setting): decoded(decoders[setting], policy) for setting, policy in policies.items()}
        try:
            samples = run_arms(arms, self.prompts, self.tokens, f"best static setting, {len(arms)} to try")
        finally:
            for used in (self.decoder, *decoders.values()):
                used.close()
        return {setting: throughput(samples[str(setting)]) for setting in policies}
