"""Decide over a network how much of a draft's distributions to send, how long a draft, and if any at all."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from spec_envs.controls.base import Control, Setting
from spec_envs.controls.observation.entries import (
    TASKS,
    WINDOWS,
    Entry,
    acceptance,
    mean,
    one_hot,
    read_match,
    text_entries,
)
from spec_envs.controls.observation.recorded import ENTROPY_UNIT
from spec_envs.controls.observation.rl_adapter_state import KS, published_state
from spec_envs.controls.rewards import rl_adapter, saved
from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.loading import Models, load_decoder
from spec_envs.network.cloud.engine import LONGEST_DRAFT
from spec_envs.network.edge.estimate import Estimate
from spec_envs.network.edge.linked import LinkedDecoder, is_address, linked
from spec_envs.network.expected_trace import ExpectedTrace
from spec_envs.network.link import load_link

ACTIONS, PROTOCOLS = ("k", "joint"), ("auto", "scalar", "full")
SEGMENTS = (16, 64)  # tokens that the cloud alone decodes in one exchange
LENGTHS = (1, 2, 4, 8, 16, 32)
MBPS, MILLISECONDS = (0.1, 10_000.0), (0.1, 10_000.0)  # what the observation shows as 0 and as 1


class Choice(NamedTuple):
    """An action: draft ``length`` tokens and send their distributions by ``mode`` (cut to ``top_k`` entries with
    ``"topk"``). With ``"cloud"`` the cloud decodes that many tokens alone; with ``"edge"`` the drafter's are taken
    unverified."""

    mode: str
    length: int
    top_k: int = 0

    def __str__(self) -> str:
        if self.mode in ("cloud", "edge"):
            return f"{self.mode} {self.length}"
        return f"{self.length}x{self.top_k if self.mode == 'topk' else self.mode}"


class TopKControl(Control):
    """
    ## Description

    An edge with a small drafter and a cloud with the target speak over a link whose rate and round trip move. The edge
    drafts a chain and sends it with as much of each token's distribution as the agent decides; the cloud verifies it in
    one forward. Few entries are quickly sent, but the fewer there are, the further the distribution is from the
    target's, and the less of the chain is accepted. The protocols are those of `spec_envs.network.wire`, every one of
    them exact: q is cut to k entries, rounded to float16 and only then drawn from (k = 0: ids and q(x) alone, DSSD,
    arXiv 2507.12000). Under greedy decoding ids are enough and k cannot matter; so temperature is 1 by default.

    ## Action Space

    - `actions="k"`: `Discrete(11)`. Action i sends `ks[i]` entries of the distribution of each of `k` drafted tokens; by
      default `ks` is 0, 50, 100, 200, 300, 500, 1000, 2000, 5000, 10000, 32000.
    - `actions="joint"`: `Discrete(n)`, one of `control.choices`: for each draft length 1, 2, 4, … up to `k`, each of
      `ks` and the whole distribution; then 16 or 64 tokens decoded by the cloud alone, in one exchange; and, with
      `edge_value`, `k` tokens of the drafter's own, which nobody verifies.

    ## Observation Space

    A `Box` of 16 float32:

    | Num | Observation | Min | Max |
    |-----|-------------|-----|-----|
    | 0 | `up`: rate to the cloud as the edge estimates it, log scale from 0.1 to 10,000 Mbps | 0 | 1 |
    | 1 | `down`: rate from the cloud, likewise | 0 | 1 |
    | 2 | `rtt`: round trip as last measured, log scale from 0.1 to 10,000 ms | 0 | 1 |
    | 3–4 | `acceptance`: accepted / drafted tokens over 4 and 16 cycles (0 where nothing was drafted) | 0 | 1 |
    | 5 | `confidence`: mean probability that the last chain's tokens had (0 without a chain) | 0 | 1 |
    | 6 | `entropy`: mean entropy of the distributions they are from, nats / 10 | 0 | 1 |
    | 7 | `match`: how many of the text's last tokens match the place that would be copied from, / 16 | 0 | 1 |
    | 8 | `position`: emitted tokens / `max_new_tokens` | 0 | 1 |
    | 9 | `context`: tokens of the text / 4096 | 0 | 1 |
    | 10–15 | `task`: one-hot of mt_bench, gsm8k, cnndm, xsum, humaneval, any other | 0 | 1 |

    `observation="rl_adapter"` is the published state of ten numbers
    (`spec_envs.controls.observation.rl_adapter_state`), linear in Mbps: rates below some ten Mbps look alike.

    ## Rewards

    The seconds are the round's own: drafting, verifying, and the bytes both ways.

    ## Starting State

    The target's first token after the prompt; the link's state is drawn at random.

    ## Information

    - `unverified`: emitted tokens that the cloud never saw; 0 without `edge_value`.

    ## Arguments

    - `ks`: candidates for k; one that exceeds the entries of the drafter's distribution sends all of them.
    - `k=4`: tokens of a draft; with `actions="joint"` of the longest one.
    - `link="markov-1-500"`: a simulated link (a name of `data/links`, a JSON file or a log in CSV, or
      `"constant:up=46,down=563,rtt=50"`), whose delays are computed and not waited for; or the address of a cloud,
      `"ws://127.0.0.1:8765"`. The state of a simulated link moves with every forward of the target, whatever was sent.
    - `protocol="auto"`: `"auto"` sends a distribution as the action says; with `actions="joint"`, `"scalar"` or
      `"full"` sends every distribution that way.
    - `actions="k"`: `"k"` chooses k, `"joint"` also the length of the draft, or the cloud alone.
    - `edge_value=None`: what an unverified token counts as, from 0 to 1. Such text is not the target's, so None leaves
      the action out.

    and the shared ones; `temperature` is 1 by default.

    ## Version History

    - v0: initial version.
    """

    name = "topk"
    observations = ("default", "rl_adapter")
    rewards = {"saved": saved, "rl_adapter": rl_adapter}  # noqa: RUF012 - declared by Control
    temperature = 1.0
    width = 1
    prunable = False

    def __init__(
        self,
        ks: tuple[int, ...] | list[int] = KS,
        k: int = 4,
        link: str = "markov-1-500",
        protocol: str = "auto",
        actions: str = "k",
        edge_value: float | None = None,
        observation: str = "default",
        cost_features: bool = False,
    ):
        super().__init__(observation, cost_features)
        if k < 1:
            raise ValueError(f"k is {k}; expected 1 or more drafted tokens")
        if not ks or min(ks) < 0 or len(set(ks)) < len(ks):
            raise ValueError(f"ks is {ks}; expected different numbers of entries, 0 or more")
        for name, value, allowed in (("actions", actions, ACTIONS), ("protocol", protocol, PROTOCOLS)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
        if edge_value is not None and (actions == "k" or not 0 <= edge_value <= 1):
            raise ValueError(f'edge_value is {edge_value}; expected 0 to 1, with actions="joint"')
        if protocol != "auto" and actions == "k":
            raise ValueError(
                f'protocol="{protocol}" sends every distribution alike, whatever k is; give actions="joint"'
            )
        if k > LONGEST_DRAFT:
            raise ValueError(f"k is {k}; expected at most {LONGEST_DRAFT}, the longest draft that a cloud verifies")
        if observation == "rl_adapter" and actions == "joint":
            raise ValueError('observation="rl_adapter" is the published state, for actions="k"')
        self.ks, self.k, self.link, self.protocol, self.edge_value = tuple(ks), k, link, protocol, edge_value
        self.max_depth = max(k - 1, 1)
        self.choices = self._choices(actions)
        self.action_space = spaces.Discrete(len(self.choices))
        self.declare(self._entries())

    def _choices(self, actions: str) -> list[Choice]:
        if actions == "k":
            return [self._cut(self.k, top_k) for top_k in self.ks]
        lengths = [length for length in LENGTHS if length <= self.k]
        drafts = [self._cut(length, top_k) for length in lengths for top_k in self.ks]
        drafts += [Choice("full", length) for length in lengths if self.protocol == "auto"]
        edge = [] if self.edge_value is None else [Choice("edge", self.k)]
        return [*dict.fromkeys(drafts), *(Choice("cloud", count) for count in SEGMENTS), *edge]

    def _cut(self, length: int, top_k: int) -> Choice:
        if self.protocol != "auto":
            return Choice(self.protocol, length)
        return Choice("topk", length, top_k) if top_k else Choice("scalar", length)

    def _entries(self) -> list[Entry]:
        if self.observation == "rl_adapter":
            return [Entry("state", 10, 0.0, 1.0, self._read_published)]
        return [
            Entry("up", 1, 0.0, 1.0, lambda d: log_scaled(estimate(d).up_mbps, MBPS)),
            Entry("down", 1, 0.0, 1.0, lambda d: log_scaled(estimate(d).down_mbps, MBPS)),
            Entry("rtt", 1, 0.0, 1.0, lambda d: log_scaled(estimate(d).rtt_ms, MILLISECONDS)),
            Entry("acceptance", len(WINDOWS), 0.0, 1.0, lambda d: [acceptance(drafted(d)[-n:]) for n in WINDOWS]),
            Entry("confidence", 1, 0.0, 1.0, partial(read_last, "probabilities")),
            Entry("entropy", 1, 0.0, 1.0, lambda d: read_last("entropies", d) / ENTROPY_UNIT),
            Entry("match", 1, 0.0, 1.0, read_match),
            *text_entries(),
            Entry("task", len(TASKS) + 1, 0.0, 1.0, lambda d: one_hot(self.task, (*TASKS, ""))),
        ]

    def static_over_plain(self, target: str, drafter: str) -> float:
        return 1.0

    def open_models(self, models: Models, clock: WallClock | None) -> LinkedDecoder:
        decoder = load_decoder(**vars(models), clock=clock, width=self.width, max_depth=self.max_depth)
        if self.edge_value is not None and not isinstance(decoder.drafter, ChainDrafter):
            raise ValueError(
                "edge_value is for a drafter that can always draft more; take a draft model, not lookup alone"
            )
        return linked(decoder, self.link, models.target)

    def open_recording(self, trace: str, clock: WallClock) -> LinkedDecoder:
        recorded = ExpectedTrace.load(trace)
        if is_address(self.link):
            raise ValueError(f"trace is {trace!r}, which takes the place of the cloud; give a simulated link")
        if unknown := sorted(set(self.ks) - set(recorded.ks)):
            raise ValueError(f"ks has {unknown}; the trace {trace!r} has {', '.join(map(str, recorded.ks))}")
        return recorded.over(load_link(self.link), clock, self.max_depth)

    def _read_published(self, decoder: LinkedDecoder) -> np.ndarray:
        link, accepted = estimate(decoder), acceptance(drafted(decoder)[-WINDOWS[-1] :])
        entropy = read_last("entropies", decoder)
        return published_state(link.up_mbps, link.rtt_ms, accepted, entropy, self.task)

    def settings(self) -> tuple[Setting, ...]:
        return tuple(map(str, self.choices))

    def prepare(self, decoder: LinkedDecoder) -> None:
        """Draft nothing: the decision comes before drafting."""

    def act(self, decoder: LinkedDecoder, action: int) -> Cycle:
        choice = self.choices[action]
        if choice.mode == "cloud":
            return decoder.decode(choice.length)
        if choice.mode == "edge":
            decoder.send("topk", None)
            return decoder.unverified(choice.length)
        decoder.send(choice.mode, choice.top_k)
        return decoder.cycle(choice.length)

    def counted_tokens(self, cycle: Cycle) -> float:
        """Return the tokens of a cycle; those that the target never saw count as ``edge_value``."""
        if self.edge_value is not None and cycle.unverified:
            return self.edge_value * cycle.emitted
        return super().counted_tokens(cycle)

    def details(self, decoder: LinkedDecoder, cycle: Cycle | None) -> dict[str, Any]:
        return {"unverified": cycle.unverified if cycle else 0}


def estimate(decoder: LinkedDecoder) -> Estimate:
    """Return the edge's estimate of its link."""
    return decoder.verifier.estimate


def drafted(decoder: LinkedDecoder) -> list[Cycle]:
    """Return the recent cycles in which a draft was verified, latest last; enough of them for an observation."""
    return [cycle for cycle in decoder.cycles[-4 * WINDOWS[-1] :] if cycle.verified]


def read_last(name: str, decoder: LinkedDecoder) -> float:
    """Return the mean of a property of the last chain's tokens; 0 before the first chain."""
    cycles = drafted(decoder)
    return mean(getattr(cycles[-1].nodes, name)) if cycles else 0.0


def log_scaled(value: float, bounds: tuple[float, float]) -> float:
    """Return a value on a logarithmic scale: 0 at the lower bound, 1 at the upper one."""
    low, high = bounds
    return min(1.0, max(0.0, math.log(value / low) / math.log(high / low))) if value > 0 else 0.0
