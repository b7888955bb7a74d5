"""The best static setting: one depth and one budget for every cycle, chosen on training prompts."""

from __future__ import annotations

from typing import Any

from agents.fixed import FixedAgent
from experiments.arms import decoded, run_arms
from experiments.comparison import throughput
from experiments.costs import cost_curves
from experiments.live import decoder_for, encoded_prompts
from spec_envs.controls import Policy
from spec_envs.controls.depth import DepthControl
from spec_envs.decoding.clock import CostTable, PricedClock

PROMPTS, TOKENS = 5, 48  # training prompts that settings are tried on, and tokens of each
DEPTHS = (1, 2, 3, 4, 6, 8)
BUDGETS = (3, 7, 11, 15, 23, 31)
START = (2, 7)


def static_policy(depth: int, budget: int, width: int = 10, max_depth: int = 12) -> Policy:
    """Every cycle drafts ``depth`` expansions and verifies ``budget`` nodes."""
    control = DepthControl(max_depth, width, budget)
    return Policy(control, FixedAgent(control, depth))


def best_static(env: dict[str, Any], width: int, max_depth: int) -> dict[str, Any]:
    """The fastest depth and budget: each axis in turn from a middling start, until neither moves.

    Under a measured clock the cost curves are measured first and price the search, so that a busy moment of the
    machine does not choose. What the chosen setting is worth is then measured live.

    Returns:
        ``best`` (depth, budget) and the ``tokens_per_second`` of every setting tried.
    """
    decoder = decoder_for(env, DepthControl(max_depth, width))
    if not decoder.clock.priced:
        decoder.clock = PricedClock(CostTable("measured", **cost_curves(decoder)))
    prompts = encoded_prompts(env, "train", PROMPTS)
    tokens = min(TOKENS, env.get("max_new_tokens", TOKENS))
    rates: dict[tuple[int, int], float] = {}
    best = (min(START[0], max_depth), START[1])
    while True:
        line = [(d, best[1]) for d in DEPTHS if d <= max_depth] + [(best[0], b) for b in BUDGETS]
        new = list(dict.fromkeys(setting for setting in line if setting not in rates))
        if new:
            arms = {f"{d},{b}": decoded(decoder, static_policy(d, b, width, max_depth)) for d, b in new}
            samples = run_arms(arms, prompts, tokens, f"best static setting, {len(new)} to try")
            rates |= {setting: throughput(samples[f"{setting[0]},{setting[1]}"]) for setting in new}
        leader = max(rates, key=rates.__getitem__)
        if leader == best or not new:
            tried = {f"depth {d}, budget {b}": rate for (d, b), rate in sorted(rates.items())}
            return {"best": list(leader), "tokens_per_second": tried}
        best = leader
