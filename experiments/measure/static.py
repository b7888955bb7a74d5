"""The best static setting, chosen on training prompts: one depth and one budget of a tree for every cycle, or one length
of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.controls import Control, Policy, make_control
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.controls.topk import TopKControl
from spec_envs.controls.tree import TreeControl
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.llama_cpp.decoder import LlamaServerDecoder
from spec_envs.experiments.measure.arms import decoded, run_arms
from spec_envs.experiments.measure.costs import cost_curves
from spec_envs.experiments.measure.link_references import best_choices
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts
from spec_envs.experiments.measure.report import setting_name
from spec_envs.experiments.measure.statistics import throughput

PROMPTS, TOKENS = 5, 48  # training prompts that settings are tried on, and tokens of each
DEPTHS = (1, 2, 3, 4, 6, 8)
BUDGETS = (3, 7, 11, 15, 23, 31)
KS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
START = (2, 7)


def static_policy(depth: int, budget: int, width: int = 10, max_depth: int = 12) -> Policy:
    """Every cycle drafts ``depth`` expansions and verifies ``budget`` nodes."""
    control = DepthControl(max_depth, width, budget)
    return Policy(control, FixedAgent(control, depth))


def static_tree(depth: int, budget: int, width: int = 10, max_depth: int = 12) -> Policy:
    """The same without a forced expansion: depth 0 verifies nodes of the first level."""
    control = TreeControl(max_depth, width, (budget,))
    return Policy(control, FixedAgent(control, f"{depth}x{budget}"))


def static_chain(k: int, k_max: int = 16) -> Policy:
    """Every cycle drafts ``k`` tokens and verifies them."""
    control = KControl(k_max, observation="counters")
    return Policy(control, FixedAgent(control, k))


def static_like(control: Control, setting: Sequence[Any]) -> Policy:
    """A static setting of the problem that a control poses."""
    if isinstance(control, TopKControl):
        return Policy(control, FixedAgent(control, setting[0]))
    if isinstance(control, KControl):
        return static_chain(setting[0], control.k_max)
    play = static_tree if isinstance(control, TreeControl) else static_policy
    return play(setting[0], setting[1], control.width, control.max_depth)


def best_like(env: dict[str, Any], control: Control) -> dict[str, Any]:
    """The fastest static setting of the problem that a control poses; see ``best_static``."""
    if isinstance(control, TopKControl):
        return best_choices(env, control)
    if isinstance(control, KControl):
        return best_chain(env, control.k_max)
    return best_static(env, control.width, control.max_depth, isinstance(control, TreeControl))


def best_static(env: dict[str, Any], width: int, max_depth: int, joint: bool = False) -> dict[str, Any]:
    """The fastest depth and budget: each axis in turn from a middling start, until neither moves.

    Args:
        joint: of ``SpecTree-v0``, where a cycle may do with the first level and with one node.

    Returns:
        ``best`` (depth, budget) and the ``tokens_per_second`` of every setting tried.
    """
    play = static_tree if joint else static_policy
    depths, budgets = ((0, *DEPTHS), (1, *BUDGETS)) if joint else (DEPTHS, BUDGETS)
    rates: dict[tuple[int, int], float] = {}
    best = (min(START[0], max_depth), START[1])
    search = Search(env, play(*best, width, max_depth).control)
    while True:
        line = [(d, best[1]) for d in depths if d <= max_depth] + [(best[0], b) for b in budgets]
        new = list(dict.fromkeys(setting for setting in line if setting not in rates))
        if new:
            rates |= search.rates({setting: play(*setting, width, max_depth) for setting in new})
        leader = max(rates, key=rates.__getitem__)
        if leader == best or not new:
            tried = {setting_name(setting): rate for setting, rate in sorted(rates.items())}
            return {"best": list(leader), "tokens_per_second": tried}
        best = leader


def best_chain(env: dict[str, Any], k_max: int = 16) -> dict[str, Any]:
    """The fastest length of a chain; 0 is plain decoding.

    Returns:
        ``best`` (k) and the ``tokens_per_second`` of every length tried.
    """
    settings = [(k,) for k in KS if k <= k_max]
    search = Search(env, make_control("k", {**env, "k_max": k_max}))
    rates = search.rates({setting: static_chain(*setting, k_max) for setting in settings})
    best = max(rates, key=rates.__getitem__)
    return {"best": list(best), "tokens_per_second": {setting_name(setting): rate for setting, rate in rates.items()}}


class Search:
    """Tries settings on training prompts.

    Under a measured clock the cost curves are measured first and price the search, so that a busy moment of the
    machine does not choose (a server is timed live). What the chosen setting is worth is then measured live.
    """

    def __init__(self, env: dict[str, Any], control: Control):
        self.decoder = decoder_for(env, control)
        if not self.decoder.clock.priced and not isinstance(self.decoder, LlamaServerDecoder):
            self.decoder.clock = PricedClock(CostTable("measured", **cost_curves(self.decoder)))
        self.prompts = encoded_prompts(env, "train", PROMPTS)
        self.tokens = min(TOKENS, env.get("max_new_tokens", TOKENS))

    def rates(self, policies: dict[Any, Policy]) -> dict[Any, float]:
        """Tokens per second of each policy."""
        decoders = {setting: self.decoder.separate() for setting in policies}
        arms = {str(setting): decoded(decoders[setting], policy) for setting, policy in policies.items()}
        try:
            samples = run_arms(arms, self.prompts, self.tokens, f"best static setting, {len(arms)} to try")
        finally:
            for used in (self.decoder, *decoders.values()):
                used.close()
        return {setting: throughput(samples[str(setting)]) for setting in policies}
