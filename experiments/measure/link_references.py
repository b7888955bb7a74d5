"""Reference policies over a link: the best single choice, and the best choice for each state of the link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.agents.rules.base import Rule
from spec_envs.controls import Control, Policy
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.engine import Engine
from spec_envs.experiments.measure.arms import Sample, decoded, run_arms, simulated_channel
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts, local_decoder
from spec_envs.experiments.measure.price_list import prices
from spec_envs.experiments.measure.results import Best, Histogram
from spec_envs.experiments.measure.statistics import throughput
from spec_envs.network.channel import SimulatedChannel
from spec_envs.network.edge.linked import is_address
from spec_envs.network.link import LinkState, MarkovLink, load_link
from spec_envs.settings import Keywords

DRAFT = 4  # length of the drafts among which the best static k is searched
PROMPTS, TOKENS = 13, 64  # training prompts on which choices are tried, and tokens of each
RECORDED = 40  # prompts if a trace is replayed, which is cheap


@dataclass(frozen=True)
class Outcome:
    """Means per cycle of a choice: tokens, seconds of computing, and bytes sent up and down."""

    tokens: float
    seconds: float
    up: float
    down: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Outcome:
        cycles = sum(s.cycles for s in samples)
        computed = sum(s.parts[part] for s in samples for part in ("draft", "verify", "policy"))
        sums = (
            sum(s.tokens for s in samples),
            computed,
            sum(s.bytes_up for s in samples),
            sum(s.bytes_down for s in samples),
        )
        return cls(*(total / cycles for total in sums))

    def over(self, state: LinkState, jitter: float) -> float:
        """Return the seconds of a cycle over a link in a state; ``jitter`` is the mean one in seconds."""
        return self.seconds + state.rtt + jitter + self.up / state.up + self.down / state.down


def best_choices(env: Keywords, control: Control, costs: CostTable | None = None) -> Best:
    """Try every choice on training prompts, and return the best one. ``best_k`` is the best one that drafts ``DRAFT``
    tokens. ``costs``, by default measured now, price what is computed in place of a measured clock."""
    decoder = decoder_for(env, control)
    if not decoder.clock.priced and not is_address(control.link):
        decoder.clock = PricedClock(costs or prices(local_decoder(env, control), env, control))
    recorded = bool(env.get("trace"))
    prompts = encoded_prompts(env, "train", PROMPTS)
    if recorded:
        prompts = list({tuple(p.ids): p for p in encoded_prompts(env, "train", RECORDED)}.values())
    most = env.get("max_new_tokens", 128)
    tokens = most if recorded else min(most, TOKENS)
    names = [name for name in control.settings() if not str(name).startswith("edge")]
    arms = {str(name): decoded(decoder, Policy(control, FixedAgent(control, value=name))) for name in names}
    samples = run_arms(arms, prompts, tokens, f"best choice over the link, {len(arms)} to try")
    decoder.close()
    rates = {name: throughput(arm) for name, arm in samples.items()}
    longest = max(draft_length(name) for name in rates)
    ks = [name for name in rates if draft_length(name) == min(DRAFT, longest) and not name.endswith("full")]
    found = Best(
        best=[max(rates, key=rates.__getitem__)],
        tokens_per_second=rates,
        best_k=[max(ks or list(rates), key=rates.__getitem__)],
        pace=max(rates.values()),
    )
    link = None if is_address(control.link) else load_link(control.link)
    if isinstance(link, MarkovLink) and not link.loss:
        outcomes = {name: Outcome.of(arm) for name, arm in samples.items()}
        found.per_state, found.pace = per_state(outcomes, link)
    return found


def draft_length(setting: str) -> int:
    """Return how many tokens a choice such as ``"4x300"`` drafts; 0 for a choice that lets the cloud decode alone."""
    length, draws, _ = setting.partition("x")
    return int(length) if draws else 0


def per_state(outcomes: dict[str, Outcome], link: MarkovLink) -> tuple[dict[str, str], float]:
    """Find the policy that knows the link's state and has the highest throughput ΣN/ΣT.

    The state moves with every forward of the target; a draft takes one forward, n tokens of the cloud alone take n. So
    this is an average-reward semi-Markov decision problem: at the optimal rate λ, the maximum over choices of
    N − λT + Σ P^forwards h − h is 0 in every state, for some h (Puterman 1994, section 11.4). It is solved by policy
    iteration that starts from the choice with the highest N/T in each state.

    Returns:
        The choice for each state, and the rate λ in tokens per second.
    """
    names, n, jitter = list(outcomes), len(link.states), link.jitter_ms / 1e3
    tokens = np.array([outcomes[name].tokens for name in names])
    seconds = np.array([[outcomes[name].over(state, jitter) for state in link.states] for name in names])
    forwards = [max(1, round(o.tokens)) if name.startswith("cloud") else 1 for name, o in outcomes.items()]
    moves = np.array([np.linalg.matrix_power(link.transitions, count) for count in forwards])
    chosen = (tokens[:, None] / seconds).argmax(0)
    while True:
        own = (chosen, np.arange(n))
        # Solve N = h − P h + λT for h and λ. As h is 0 in the first state, λ takes the place of its unknown.
        system = np.eye(n) - moves[own]
        system[:, 0] = seconds[own]
        rate, *rest = np.linalg.solve(system, tokens[chosen])
        bias = np.array([0.0, *rest])
        gain = tokens[:, None] - rate * seconds + moves @ bias
        better = np.where(gain.max(0) > gain[own] + 1e-9, gain.argmax(0), chosen)
        if (better == chosen).all():
            return {label(s): names[c] for s, c in zip(link.states, chosen, strict=True)}, float(rate)
        chosen = better


def link_policies(control: Control, decoder: Engine, static: Best) -> dict[str, Policy]:
    """Return further reference policies: the best static k and, over a Markov link, the best choice for each state."""
    policies = {}
    if static.best_k and static.best_k != static.best:
        policies["static k"] = Policy(control, FixedAgent(control, value=static.best_k[0]))
    channel = simulated_channel(decoder)
    if static.per_state and channel:
        policies["per state"] = Policy(control, PerState(control, channel, static.per_state))
    return policies


def choices_by_state(control: Control, samples: Sequence[Sample]) -> Histogram:
    """Return how often each choice was made in each state of a simulated link; the states ascend by rate."""
    offered, seen = control.settings(), {state for sample in samples for state in sample.states}
    counts: dict[str, Counter[str]] = {label(s): Counter() for s in sorted(seen, key=lambda s: (s.up_mbps, s.rtt_ms))}
    for sample in samples:
        for state, action in zip(sample.states, sample.actions, strict=True):
            counts[label(state)][str(offered[action])] += 1
    return {state: dict(counter) for state, counter in counts.items()}


def label(state: LinkState) -> str:
    """Return a state of a link in words, such as ``"5 Mbps, 50 ms"``."""
    return f"{state.up_mbps:g} Mbps, {state.rtt_ms:g} ms"


class PerState(Rule):
    """Makes the choice that is best in the current state of the simulated link, which it reads from the link itself."""

    def __init__(self, control: Control, channel: SimulatedChannel, choices: dict[str, str]):
        super().__init__(control)
        self.channel = channel
        offered = control.settings()
        self.actions = {state: offered.index(choice) for state, choice in choices.items()}

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        return self.actions[label(self.channel.link.state)], state
