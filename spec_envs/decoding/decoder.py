"""One sequence under speculative decoding: start, expand, verify; what it emitted and what it cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.drafters.base import Drafter, Reader
from spec_envs.decoding.tree import Children, Tree
from spec_envs.decoding.verifier import LocalVerifier, Traffic, Verifier
from spec_envs.text import SILENT, Detokenizer


@dataclass(frozen=True)
class Drafted:
    """The nodes a cycle verified, for those who want to look: tokens, parents, levels ``[n]`` and the accepted path; of
    a chain also each token's probability and the entropy in nats of the distribution it is from."""

    tokens: np.ndarray
    parents: np.ndarray
    levels: np.ndarray
    path: list[int]
    probabilities: np.ndarray
    entropies: np.ndarray


NONE, NO_TOKENS = np.zeros(0), np.zeros(0, np.int64)
NOTHING = Drafted(NO_TOKENS, NO_TOKENS, NO_TOKENS, [], NONE, NONE)


@dataclass(frozen=True)
class Cycle:
    """One draft-and-verify round.

    Attributes:
        tokens: what it emitted, cut at EOS and at max_new_tokens.
        accepted: emitted tokens that were drafted.
        drafted: candidates drafted.
        verified: drafted nodes sent to the target (the root not counted).
        depth: expansions after the first level.
        seconds: by part (draft, verify, network, policy).
        nodes: the verified nodes.
        bytes_up, bytes_down: sent to the target and back, where a network lies between.
        unverified: emitted tokens that the target never saw.
    """

    tokens: list[int]
    accepted: int
    drafted: int
    verified: int
    depth: int
    seconds: dict[str, float]
    nodes: Drafted
    bytes_up: int = 0
    bytes_down: int = 0
    unverified: int = 0

    @property
    def emitted(self) -> int:
        return len(self.tokens)

    @property
    def scored(self) -> int:
        """Of a chain, the drafted tokens that were judged: up to the first refused one, and within the text."""
        return min(self.verified, self.accepted + (self.emitted > self.accepted))


def merged(cycles: Sequence[Cycle]) -> Cycle:
    """Several cycles as one: what they emitted, accepted, drafted and cost together; the nodes are the last one's."""
    if len(cycles) == 1:
        return cycles[0]
    counts = ("accepted", "drafted", "verified", "bytes_up", "bytes_down", "unverified")
    accepted, drafted, verified, *rest = (sum(getattr(c, name) for c in cycles) for name in counts)
    seconds = {part: sum(cycle.seconds[part] for cycle in cycles) for part in cycles[0].seconds}
    tokens = [token for cycle in cycles for token in cycle.tokens]
    return Cycle(tokens, accepted, drafted, verified, cycles[-1].depth, seconds, cycles[-1].nodes, *rest)


def check_room(prompt: Sequence[int], max_new_tokens: int, positions: int, context: int) -> None:
    """Refuse a prompt that is empty, or that does not leave ``positions`` of the context."""
    if not len(prompt):
        raise ValueError("the prompt is empty; expected at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if len(prompt) + positions > context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and generation may need {positions} more, but the context is "
            f"{context}: shorten the prompt or lower max_new_tokens"
        )


def check_ids(prompt: Sequence[int], vocab: int) -> None:
    """Refuse ids that the target has no embedding for."""
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        wrong = next(i for i in prompt if not 0 <= i < vocab)
        raise ValueError(f"the prompt has the id {wrong}; expected ids of the target, 0 to {vocab - 1}")


class Decoder:
    """Drives a drafter and a verifier over one text at a time.

    Args:
        verifier, drafter: the two sides; the drafter may be None, for plain decoding.
        clock: charged for every forward.
        eos: ids that end a text.
        max_depth: most expansions of a cycle.
        detokenize: text of token ids, for who looks at it or prints it.

    Attributes:
        prompt, tokens: ids of the text, and of what was emitted (the first token included).
        context: most tokens of a text, and of what may be drafted behind it.
        tree: candidates of the cycle under way.
        cycles: finished cycles of this text.
        finished: whether EOS was emitted or max_new_tokens reached.

        times_itself: whether seconds are those that another process reports.

    Raises:
        ValueError: drafter and target have different vocabularies.
    """

    times_itself = False

    def __init__(
        self,
        verifier: Verifier,
        drafter: Drafter | None,
        clock: WallClock,
        eos: Collection[int],
        max_depth: int = 12,
        detokenize: Detokenizer = SILENT,
    ):
        if drafter is not None and drafter.vocab != verifier.vocab:
            raise ValueError(f"the drafter's vocabulary has {drafter.vocab} ids, the target's {verifier.vocab}")
        self.verifier, self.drafter, self.clock = verifier, drafter, clock
        self.eos = frozenset(eos)
        self.max_depth, self.detokenize = max_depth, detokenize
        self.context = min(side.context for side in (verifier, drafter) if side is not None)
        self.tree = Tree(drafter.width if drafter else 0, max_depth)
        self.finished = True

    def start(self, prompt: Sequence[int], max_new_tokens: int, rng: np.random.Generator) -> None:
        """Prefill and the first token; charged to ``prefill``, not to a cycle.

        Raises:
            ValueError: the prompt is empty or does not fit the context. There is no text then, not even the one before.
        """
        self.finished = True
        self.clock.restart()
        positions = max_new_tokens + self.max_depth + 1
        check_room(prompt, max_new_tokens, positions, self.context)
        check_ids(prompt, self.verifier.vocab)
        self.prompt, self.max_new_tokens = list(prompt), max_new_tokens
        self.tree.clear()
        self.cycles: list[Cycle] = []
        with self.clock.time("prefill", len(prompt)):
            first = self.verifier.start(prompt, positions + self.tree.capacity, rng)
            if self.drafter:
                self.drafter.start([*prompt, first], positions, self.verifier.features, rng)
        self.clock.travel(self.verifier.traffic.seconds, "prefill", self.verifier.traffic.simulated)
        self.tokens = [first]
        self.finished = first in self.eos or max_new_tokens == 1
        self.drafting = False
        self._cycle_began = dict(self.clock.totals)

    @property
    def in_process(self) -> bool:
        """Whether the target is a model in this process."""
        return isinstance(self.verifier, LocalVerifier)

    @property
    def local(self) -> LocalVerifier:
        """The verifier, where the target is a model in this process.

        Raises:
            ValueError: it is not.
        """
        if not isinstance(self.verifier, LocalVerifier):
            raise ValueError("there is no target in this process to look into; expected a decoder over a model")
        return self.verifier

    @property
    def temperature(self) -> float:
        """Of the target's sampling; 0 is greedy."""
        return self.verifier.temperature

    @property
    def device(self) -> torch.device:
        """Where the target computes."""
        return self.verifier.device

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return self.verifier.dtype

    def plain(self) -> Decoder:
        """A decoder for the same target and sampling that never drafts."""
        clock = self.clock if self.clock.priced else WallClock(self.device)
        return Decoder(self.verifier.plain(self.eos), None, clock, self.eos, 0, self.detokenize)

    def separate(self) -> Decoder:
        """A decoder for another arm of a comparison: itself, for nothing of it outlives a text."""
        return self

    def close(self) -> None:
        """Let go of what lies outside of this process; the weights are shared. May be called twice."""
        self.verifier.close()

    @property
    def length(self) -> int:
        """Tokens of the whole text."""
        return len(self.prompt) + len(self.tokens)

    def begin(self) -> None:
        """The root's drafter forward, which gives the first level. Does nothing within a cycle."""
        if self.drafting:
            return
        self._check_alive()
        assert self.drafter is not None
        with self.clock.time("draft") as forward:
            forward.rows = self.drafter.root(self.tree)
        self.drafting = True

    def expand(self) -> bool:
        """One drafter forward: the tree grows by a level. False where the drafter has nothing more to say."""
        self.begin()
        before = self.tree.size
        assert self.drafter is not None
        with self.clock.time("draft") as forward:
            forward.rows = self.drafter.expand(self.tree)
        return self.tree.size > before

    def look(self) -> Tensor:
        """What the drafter's projection reads behind the text and the chain under way, ``[hidden]``: for an agent that
        drafts in its place. Read once, however often it is asked for."""
        self._check_alive()
        assert isinstance(self.drafter, Reader)
        with self.clock.time("draft") as forward:
            state, forward.rows = self.drafter.look(self.tree.tokens.tolist())
        return state[0]

    def put(self, token: int) -> None:
        """A token that was chosen outside joins the chain."""
        self._check_alive()
        children = Children(np.array([[token]]), np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
        if self.tree.size:
            self.tree.grow(children)
        else:
            self.tree.start(children)
        self.drafting = True

    def verify(self, budget: int | None = None) -> Cycle:
        """One target forward over the ``budget`` best candidates (all by default); at least one token is emitted.

        Without a first level, or with budget 0, this is one step of plain decoding.

        Raises:
            ValueError: a budget below 0, or one that would cut a chain that was drawn: what is left of it would not be
                distributed as the acceptance rule expects.
        """
        self._check_alive()
        drafted, depth = self.tree.size, self.tree.expansions
        if budget is not None and budget < 0:
            raise ValueError(f"budget is {budget}; expected 0 or more nodes")
        selected = min(drafted, budget if budget is not None else drafted)
        if self.tree.proposals and selected < drafted:
            raise ValueError(f"budget is {budget}, but {drafted} tokens were drawn; a drawn chain is verified whole")
        with self.clock.time("verify", selected + 1):
            tokens, parents, levels = self.tree.subtree(self.tree.select(selected))
            verdict = self.verifier.verify(tokens, parents, levels, self.tree.proposals)
        emitted = self._cut([*(int(tokens[node]) for node in verdict.path), verdict.token])
        accepted = min(len(verdict.path), len(emitted))
        nodes = Drafted(tokens, parents, levels, verdict.path[:accepted], *self._confidence())
        counts = {"accepted": accepted, "drafted": drafted, "verified": selected, "depth": depth}
        return self._emit(emitted, self.verifier.traffic, nodes, **counts)

    def cycle(self, k: int) -> Cycle:
        """Draft ``k`` levels and verify all of them; 0 is plain decoding."""
        if k > 0:
            self.begin()
            for _ in range(k - 1):
                self.expand()
        return self.verify()

    def decode(self, count: int) -> Cycle:
        """The target alone adds up to ``count`` tokens, as one cycle; behind a network in one exchange."""
        self._check_undrafted()
        with self.clock.time("verify", 1) as forward:
            tokens = self.verifier.decode(min(count, self.max_new_tokens - len(self.tokens)), self.eos)
            forward.times = len(tokens)
        return self._emit(tokens, self.verifier.traffic)

    def unverified(self, k: int) -> Cycle:
        """``k`` drafted tokens become text as they are, without the target: not what it would have said."""
        self._check_undrafted()
        self.begin()
        for _ in range(k - 1):
            self.expand()
        emitted = self._cut(self.tree.tokens.tolist())
        self.verifier.append(emitted)
        return self._emit(emitted, Traffic(), drafted=self.tree.size, unverified=len(emitted))

    def _emit(self, emitted: list[int], traffic: Traffic, nodes: Drafted = NOTHING, **counts: int) -> Cycle:
        """End a cycle: the text grows, what it cost is charged, the tree is dropped. ``counts`` are those of ``Cycle``."""
        self.tokens.extend(emitted)
        self.finished = emitted[-1] in self.eos or len(self.tokens) == self.max_new_tokens
        if self.drafter and not self.finished:
            self.drafter.commit(emitted, self.verifier.features)
        self.clock.travel(traffic.seconds, "verify", traffic.simulated)
        seconds = self.clock.since(self._cycle_began)
        del seconds["prefill"]
        self._cycle_began = dict(self.clock.totals)
        counts = dict.fromkeys(("accepted", "drafted", "verified", "depth"), 0) | counts
        sent = {"bytes_up": traffic.bytes_up, "bytes_down": traffic.bytes_down}
        self.cycles.append(Cycle(tokens=emitted, seconds=seconds, nodes=nodes, **counts, **sent))
        self.tree.clear()
        self.drafting = False
        return self.cycles[-1]

    def _confidence(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a chain: each token's probability, and the entropy of the distribution it is from."""
        if self.tree.width != 1 or not self.tree.size:
            return np.zeros(0), np.zeros(0)
        steps = self.tree.scores.copy()
        steps[1:] -= self.tree.scores[:-1]
        return np.exp(steps), np.concatenate(self.tree.entropies)

    def _cut(self, tokens: list[int]) -> list[int]:
        """Tokens up to the first EOS and to max_new_tokens."""
        tokens = tokens[: self.max_new_tokens - len(self.tokens)]
        for i, token in enumerate(tokens):
            if token in self.eos:
                return tokens[: i + 1]
        return tokens

    def _check_undrafted(self) -> None:
        self._check_alive()
        if self.tree.size:
            raise RuntimeError("a cycle is under way; call verify() first")

    def _check_alive(self) -> None:
        if self.finished:
            raise RuntimeError("the text has ended; call start() with the next prompt")
