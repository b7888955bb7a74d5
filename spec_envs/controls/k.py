"""Decide how long a chain to draft."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces

from spec_envs.checked import check_number
from spec_envs.controls import candidates
from spec_envs.controls.base import LONGEST_CHAIN, Control, Setting
from spec_envs.controls.observation.entries import (
    TASKS,
    WINDOWS,
    Entry,
    acceptance,
    copies,
    mean,
    one_hot,
    read_match,
    text_entries,
)
from spec_envs.controls.observation.recorded import (
    ENTROPY_UNIT,
    recorded_free,
    recorded_path,
    recorded_probability,
    recorded_size,
    recorded_token_entropy,
)
from spec_envs.controls.observation.text_kind import KINDS, TextKind
from spec_envs.controls.plans import Plans, chain_plans
from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.cycle import Cycle, merged
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.llama_cpp.engine import drafter_for, open_server
from spec_envs.decoding.llama_cpp.server import check_server_args
from spec_envs.decoding.loading import Models
from spec_envs.decoding.tree import ALTERNATIVES

VERIFY, DRAFT = 0, 1
SEGMENT = 64  # tokens between decisions where a server decodes whole segments
ENGINES = ("torch", "llama-server")
DECISIONS = ("cycle", "token")


class KControl(Control):
    """
    ## Description

    A chain of K tokens is drafted, each by a forward of a draft model or copied from where the text read like this
    before (`drafter="lookup+…"`, the default), and the target verifies all of them in one forward. Long chains pay
    where the drafter is nearly always right; where it is not, K = 0, plain decoding, is the fastest. The agent decides
    K once per cycle (`decision="cycle"`), or after each drafted token whether to continue (`decision="token"`). The
    chain is that of Leviathan et al. 2023 (arXiv 2211.17192); its length is lossless however it is chosen, since a
    token that was drawn is verified whatever made the agent stop after it.

    ## Action Space

    - `decision="cycle"`: `Discrete(k_max + 1)`. Action K drafts K tokens and verifies them; 0 is plain decoding.
    - `decision="token"`: `Discrete(2)`. 0 verifies, 1 drafts one more token. The first decision of a cycle is made
      before anything is drafted. At `k_max` tokens, or where prompt lookup has nothing more to copy, verification
      follows within the step.

    ## Observation Space

    A `Box` of float32; with the default `decision="cycle"`:

    | Num | Observation | Min | Max |
    |-----|-------------|-----|-----|
    | 0 | `confidence`: mean probability that the last chain's tokens had (0 without a chain) | 0 | 1 |
    | 1 | `entropy`: mean entropy of the distributions they are from, nats / 10 | 0 | 1 |
    | 2 | `match`: how many of the text's last tokens match the place that would be copied from, / 16 | 0 | 1 |
    | 3–4 | `acceptance`: accepted / drafted tokens over 4 and 16 decisions (0 where nothing was drafted) | 0 | 1 |
    | 5 | `last_k`: tokens of the last chain / `k_max` | 0 | 1 |
    | 6 | `last_acceptance`: accepted / drafted tokens of the last decision | 0 | 1 |
    | 7 | `position`: emitted tokens / `max_new_tokens` | 0 | 1 |
    | 8 | `context`: tokens of the text / 4096 | 0 | 1 |
    | 9–13 | `kind`: one-hot of code, prose, math, json, list, detected from the last 96 tokens | 0 | 1 |
    | 14–19 | `task`: one-hot of mt_bench, gsm8k, cnndm, xsum, humaneval, any other | 0 | 1 |

    With `decision="token"` the first two give way to five of the chain under way: `drafted` (its tokens / `k_max`),
    `probability` (that the drafter gave its last token; 1 before the first), `entropy` (of the distribution that
    token is from, nats / 10; 0 before the first), `path` (product of the chain's probabilities) and `free` (1 if the
    next token would be copied, at no cost; 0 if the draft model would compute it). With an `adjustment_interval` the
    first three are left out, since a server reports counts only, and `last_k` is the length asked for.

    `observation="counters"` is `acceptance`, `last_k`, `last_acceptance`, `position` and `context` alone.

    ## Starting State

    The target's first token after the prompt; nothing is drafted.

    ## Information

    On llama-server, the last step has `restart_seconds`: seconds in which the server was restarted, which are not
    charged.

    ## Arguments

    - `k_max=16`: tokens of the longest chain, 2 or more.
    - `decision="cycle"`: `"cycle"` decides before a chain is drafted, `"token"` after each of its tokens.
    - `alternatives=None`: how many further tokens of each of the draft model's distributions are verified beside the
      one that it drafted, 0 to 3. Where the target rejects a token for one of them, that is accepted, and one token more
      is emitted. By default 3, or 0 on a server and with an `adjustment_interval`.
    - `alternative_chance=0.04`: least probability that the draft model gives to such a token and those before it.
    - `engine="torch"`: `"torch"` decodes in this process; with `"llama-server"` a server of llama.cpp decodes whole
      segments.
    - `adjustment_interval=None`: tokens that a decision is kept for; by default one cycle, or 64 on a server.
    - `server_args=None`: further arguments of llama-server, for example `["--device", "CUDA0", "--gpu-layers", "99"]`.

    and the shared ones.

    ## Version History

    - v0: initial version.
    """

    name = "k"
    trace_kind = "chain"
    observations = ("default", "counters")
    width = 1
    prunable = False

    def __init__(
        self,
        k_max: int = 16,
        decision: str = "cycle",
        engine: str = "torch",
        adjustment_interval: int | None = None,
        server_args: list[str] | None = None,
        alternatives: int | None = None,
        alternative_chance: float = 0.04,
        observation: str = "default",
        cost_features: bool = False,
    ):
        super().__init__(observation, cost_features)
        if not 2 <= k_max <= LONGEST_CHAIN:
            raise ValueError(f"k_max is {k_max}; expected 2 to {LONGEST_CHAIN}")
        for name, value, allowed in (("decision", decision, DECISIONS), ("engine", engine, ENGINES)):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
        interval = (SEGMENT if engine == "llama-server" else 0) if adjustment_interval is None else adjustment_interval
        if interval < 0 or (engine == "llama-server" and not interval):
            raise ValueError(f"adjustment_interval is {interval}; expected tokens (on torch, 0 decides every cycle)")
        if decision == "token" and interval:
            raise ValueError('decision="token" decides within a chain; leave out adjustment_interval and llama-server')
        if server_args and engine != "llama-server":
            raise ValueError(f"server_args is {server_args!r}, which is for engine='llama-server', not {engine!r}")
        if alternatives is None:
            alternatives = 0 if interval else ALTERNATIVES
        if not 0 <= alternatives <= ALTERNATIVES:
            raise ValueError(f"alternatives is {alternatives}; expected 0 to {ALTERNATIVES}")
        if alternatives and interval:
            raise ValueError("alternatives are for chains that are decided one by one; leave out adjustment_interval")
        check_number("alternative_chance", alternative_chance, lambda chance: 0 < chance < 1, "a number in (0, 1)")
        self.alternatives, self.alternative_chance = alternatives, alternative_chance
        self.beside = (alternatives, alternative_chance) if alternatives else ()  # of which servers have none
        check_server_args(server_args or ())
        self.server_args = server_args or ()
        self.k_max, self.max_depth, self.decision, self.engine = k_max, k_max - 1, decision, engine
        self.adjustment_interval = interval
        self.progress, self.full_progress = "drafted" if decision == "token" else "", k_max
        self.action_space = spaces.Discrete(2 if decision == "token" else k_max + 1)
        self._forget()
        self.declare(self._entries())

    def default_drafter(self, target: str) -> str:
        if self.engine == "torch":
            return super().default_drafter(target)
        return drafter_for(target)

    def static_over_plain(self, target: str, drafter: str) -> float:
        return super().static_over_plain(target, drafter) if self.engine == "torch" else 1.0

    def open_models(self, models: Models, clock: WallClock | None) -> Engine:
        if self.engine == "torch":
            return super().open_models(models, clock)
        return open_server(models, self.k_max, self.adjustment_interval, clock, self.server_args)

    def open_recording(self, trace: str, clock: WallClock) -> Engine:
        if self.engine != "torch":
            raise ValueError(f"trace is {trace!r}, which takes the place of {self.engine}; give one of the two")
        return super().open_recording(trace, clock)

    def _entries(self) -> list[Entry]:
        counters = [
            Entry("acceptance", len(WINDOWS), 0.0, 1.0, self._read_acceptance),
            Entry("last_k", 1, 0.0, 1.0, self._read_last_k),
            Entry("last_acceptance", 1, 0.0, 1.0, self._read_last_acceptance),
            *text_entries(),
        ]
        if self.observation == "counters":
            return counters
        chain: list[Entry] = []
        if self.decision == "token":
            chain = [
                Entry("drafted", 1, 0.0, 1.0, partial(self._read_of_chain, 0), recorded_size),
                Entry("probability", 1, 0.0, 1.0, partial(self._read_of_chain, 1), recorded_probability),
                Entry("entropy", 1, 0.0, 1.0, partial(self._read_of_chain, 2), recorded_token_entropy),
                Entry("path", 1, 0.0, 1.0, partial(self._read_of_chain, 3), recorded_path),
                Entry("free", 1, 0.0, 1.0, read_free, recorded_free),
            ]
        elif not self.adjustment_interval:
            chain = [
                Entry("confidence", 1, 0.0, 1.0, self._read_confidence),
                Entry("entropy", 1, 0.0, 1.0, self._read_entropy),
            ]
        if not self.adjustment_interval:
            chain.append(Entry("match", 1, 0.0, 1.0, read_match))
        return [
            *chain,
            *counters,
            Entry("kind", len(KINDS), 0.0, 1.0, self._read_kind),
            Entry("task", len(TASKS) + 1, 0.0, 1.0, self._read_task),
        ]

    def reset(self, rng: np.random.Generator, task: str = "") -> None:
        super().reset(rng, task)
        self._forget()

    def _forget(self) -> None:
        self.decided: list[Cycle] = []  # one per decision that led to a verification
        self.last_k = 0
        self.kind = TextKind()
        self.before: np.ndarray | None = None  # what was observed before the chain under way

    def observe(self, decoder: Any, looks_at: Collection[str] | None = None) -> np.ndarray:
        """Return the observation as ``Control.observe`` does; within a chain only the chain's own entries are read
        again."""
        if self.decision == "token" and decoder.tree.size and self.before is not None and "free" in self.slices:
            vector = self.before.copy()
            vector[: self.slices["free"].stop] = *self._read_chain(decoder), copies(decoder)
            return vector
        self.before = super().observe(decoder, looks_at)
        return self.before.copy()

    def settings(self) -> tuple[Setting, ...]:
        return tuple(range(self.k_max + 1))

    def follow(self, setting: Setting, observation: np.ndarray) -> int:
        k = int(setting)
        if not 0 <= k <= self.k_max:
            raise ValueError(f"k is {k}; expected 0 to {self.k_max}")
        if not self.progress:
            return k
        return DRAFT if self.drafted(observation) < k else VERIFY

    def followed(self, actions: Sequence[int], lengths: Sequence[int]) -> list[Setting]:
        return list(lengths) if self.progress else super().followed(actions, lengths)

    def candidates(self) -> dict[str, Sequence[Setting]]:
        return {"k": [k for k in candidates.KS if k <= self.k_max]}

    def static(self, *values: Setting) -> tuple[Control, Setting]:
        return chains_of(self, observation="counters"), values[0]

    def plans(self) -> Plans:
        if self.adjustment_interval:
            return super().plans()
        drafts = DRAFT if self.decision == "token" else None
        least = float(np.log(self.alternative_chance))
        return chain_plans(self.k_max, drafts, self.place("drafted"), self.alternatives, least)

    def details(self, decoder: Any, cycle: Cycle | None) -> dict[str, Any]:
        if self.engine == "torch" or cycle is None or not decoder.finished:
            return {}
        return {"restart_seconds": decoder.restart_seconds}

    def prepare(self, decoder: Decoder) -> None:
        """Draft nothing: the first decision of a cycle comes before drafting."""

    def act(self, decoder: Decoder, action: int) -> Cycle | None:
        if self.decision == "token":
            if action == DRAFT:
                before = decoder.tree.size
                draft(decoder)
                if before < decoder.tree.size < self.k_max:  # it does not grow if the drafter has nothing more
                    return None
            self.last_k = decoder.tree.size
            self.decided.append(decoder.verify(None, *self.beside))
            return self.decided[-1]
        cycles = [decoder.cycle(action, *self.beside)]
        while not decoder.finished and sum(cycle.emitted for cycle in cycles) < self.adjustment_interval:
            cycles.append(decoder.cycle(action))
        self.decided.append(merged(cycles))
        self.last_k = action if self.adjustment_interval else cycles[0].drafted
        return self.decided[-1]

    def _read_acceptance(self, decoder: Decoder) -> list[float]:
        return [acceptance(self.decided[-n:]) for n in WINDOWS]

    def _read_last_k(self, decoder: Decoder) -> float:
        return self.last_k / self.k_max

    def _read_last_acceptance(self, decoder: Decoder) -> float:
        return acceptance(self.decided[-1:])

    def _read_confidence(self, decoder: Decoder) -> float:
        return mean(self._last_nodes("probabilities"))

    def _read_entropy(self, decoder: Decoder) -> float:
        return mean(self._last_nodes("entropies")) / ENTROPY_UNIT

    def _read_kind(self, decoder: Decoder) -> list[float]:
        return one_hot(self.kind.read(decoder), KINDS)

    def _read_task(self, decoder: Decoder) -> list[float]:
        return one_hot(self.task, (*TASKS, ""))

    def _read_of_chain(self, i: int, decoder: Decoder) -> float:
        return self._read_chain(decoder)[i]

    def _read_chain(self, decoder: Decoder) -> tuple[float, float, float, float]:
        tree = decoder.tree
        if not tree.size:
            return 0.0, 1.0, 0.0, 1.0
        path = float(tree.scores[-1])
        above = float(tree.scores[-2]) if tree.size > 1 else 0.0
        entropy = min(1.0, float(tree.entropies[-1][0]) / ENTROPY_UNIT)
        return tree.size / self.k_max, float(np.exp(path - above)), entropy, float(np.exp(path))

    def _last_nodes(self, name: str) -> np.ndarray:
        return getattr(self.decided[-1].nodes, name) if self.decided else np.zeros(0)


def chains_of(control: Control, **changes: Any) -> KControl:
    """Return the control of chains as long as those of another one and with the same alternatives, but for what
    ``changes`` give otherwise."""
    own = {"alternatives": control.alternatives, "alternative_chance": control.alternative_chance}
    return KControl(control.max_depth + 1, **{**own, **changes})


def read_free(decoder: Decoder) -> float:
    """Return 1 if the next token of the chain under way would be copied, else 0."""
    return float(copies(decoder))


def draft(decoder: Decoder) -> None:
    """Draft one more token."""
    if decoder.drafting:
        decoder.expand()
    else:
        decoder.begin()
