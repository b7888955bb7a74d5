"""One sequence under speculative decoding: start, expand, verify."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Collection, Sequence
from typing import TypeGuard

import numpy as np
import torch

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.cycle import NO_NODES, Cycle, Drafted
from spec_envs.decoding.drafters.base import Drafter
from spec_envs.decoding.drafters.copying import remembers
from spec_envs.decoding.engine import Engine, TextEngine, check_room
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.tree import Tree
from spec_envs.decoding.verifier import LocalVerifier, Traffic, Verifier
from spec_envs.text import SILENT, Detokenizer

NOT_HERE = "the target is not a model in this process; expected a decoder over models"


def check_ids(prompt: Sequence[int], vocab: int) -> None:
    """Refuse a prompt with ids that the target has no embedding for.

    Raises:
        ValueError: the prompt has such an id; the message names it.
    """
    if not 0 <= min(prompt) <= max(prompt) < vocab:
        wrong = next(i for i in prompt if not 0 <= i < vocab)
        raise ValueError(f"the prompt has the id {wrong}; expected ids of the target, 0 to {vocab - 1}")


class Decoder(TextEngine):
    """Drives a drafter and a verifier over one text at a time; an ``Engine`` whose cycles are made step by step.

    Args:
        verifier: the target's side.
        drafter: the drafter's side; None decodes plainly.
        clock: charged for every forward.
        eos: ids that end a text.
        max_depth: most expansions of a cycle.
        detokenize: returns the text of token ids.

    Attributes: as in ``Engine``.

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
        super().__init__(clock)
        self.verifier, self.drafter = verifier, drafter
        self.eos = frozenset(eos)
        self.max_depth, self.detokenize = max_depth, detokenize
        self.context = min(side.context for side in (verifier, drafter) if side is not None)
        self.tree = Tree(drafter.width if drafter else 0, max_depth)

    def start(self, prompt: Sequence[int], max_new_tokens: int, rng: np.random.Generator) -> None:
        self.finished = True
        self.clock.restart()
        positions = max_new_tokens + self.max_depth + 1
        check_room(prompt, max_new_tokens, positions, self.context)
        check_ids(prompt, self.verifier.vocab)
        self._begin(prompt, max_new_tokens)
        self.tree.clear()
        with self.clock.time("prefill", len(prompt)):
            first = self.verifier.start(prompt, positions + self.tree.most_rows, rng)
            if self.drafter:
                self.drafter.start([*prompt, first], positions, self.verifier.features, rng)
        self.clock.travel(self.verifier.traffic.seconds, "prefill", self.verifier.traffic.simulated)
        self.tokens = [first]
        self.finished = first in self.eos or max_new_tokens == 1
        self.drafting = False
        self._mark()

    @property
    def local(self) -> LocalVerifier:
        """The verifier with its target, which has to be a model in this process.

        Raises:
            ValueError: the target is elsewhere.
        """
        if not isinstance(self.verifier, LocalVerifier):
            raise ValueError(NOT_HERE)
        return self.verifier

    @property
    def temperature(self) -> float:
        return self.verifier.temperature

    @property
    def device(self) -> torch.device:
        return self.verifier.device

    @property
    def dtype(self) -> str:
        return self.verifier.dtype

    def plain(self) -> Decoder:
        clock = self.clock if self.clock.priced else WallClock(self.device)
        return Decoder(self.verifier.plain(self.eos), None, clock, self.eos, 0, self.detokenize)

    def separate(self) -> Decoder:
        """Return this decoder itself: no state survives a text.

        Raises:
            ValueError: the drafter drafts from earlier answers, which would be those of every arm.
        """
        if remembers(self.drafter):
            raise ValueError("suffix@stream drafts from the answers of all arms of a comparison; take suffix")
        return self

    def close(self) -> None:
        self.verifier.close()

    def plain_seconds(self) -> float:
        return measured_plain(self.local.target)

    def begin(self) -> None:
        """Draft the first level by a forward from the root. Do nothing within a cycle."""
        if self.drafting:
            return
        self._check_alive()
        drafter = self._need_drafter()
        with self.clock.time("draft") as forward:
            forward.rows, forward.drafter = drafter.root(self.tree), drafter.drafting
        self.drafting = True

    def expand(self) -> bool:
        """Draft a further level, by one forward. Return True if the tree grew, False if the drafter has nothing more to
        propose."""
        self.begin()
        drafter, before = self._need_drafter(), self.tree.size
        with self.clock.time("draft") as forward:
            forward.rows, forward.drafter = drafter.expand(self.tree), drafter.drafting
        return self.tree.size > before

    def verify(self, budget: int | None = None, alternatives: int = 0, chance: float = 0.0) -> Cycle:
        """Verify the ``budget`` best candidates (all by default) in one forward of the target; at least one token is
        emitted.

        Without a first level, or with budget 0, this is one step of plain decoding.

        Args:
            budget: most candidates; of a chain its first ones.
            alternatives: of a draft model's chain, most tokens that are verified beside each of it, up to
                ``ALTERNATIVES``; none over a network. Where the target rejects a token for one of them, that is
                accepted.
            chance: least probability of such a token and those before it, in the drafter's own estimate.

        Raises:
            ValueError: a budget below 0, or one that would cut a chain that was drawn: the rest of such a chain is not
                distributed as the acceptance rule expects.
        """
        self._check_alive()
        drafted, depth = self.tree.size, self.tree.expansions
        if budget is not None and budget < 0:
            raise ValueError(f"budget is {budget}; expected 0 or more nodes")
        selected = min(drafted, budget if budget is not None else drafted)
        if self.tree.proposals and selected < drafted:
            raise ValueError(f"budget is {budget}, but {drafted} tokens were drawn; a drawn chain is verified whole")
        with self.clock.time("verify", selected + 1) as forward:
            tokens, parents, levels = self.tree.subtree(self.tree.select(selected))
            if alternatives and selected and self.tree.width == 1 and not self.verifier.chains_only:
                *further, _ = self.tree.beside(selected, alternatives, chance)
                tokens, parents, levels = map(np.concatenate, zip((tokens, parents, levels), further, strict=True))
                forward.rows = len(tokens) + 1
            verdict = self.verifier.verify(tokens, parents, levels, self.tree.proposals)
        emitted = self._cut([*(int(tokens[node]) for node in verdict.path), verdict.token])
        accepted = min(len(verdict.path), len(emitted))
        nodes = Drafted(tokens, parents, levels, verdict.path[:accepted], *self._confidence(selected))
        counts = {"accepted": accepted, "drafted": drafted, "verified": len(tokens), "depth": depth}
        counts["beside"] = sum(node >= selected for node in verdict.path[:accepted])
        return self._emit(emitted, self.verifier.traffic, nodes, **counts)

    def cycle(self, k: int, alternatives: int = 0, chance: float = 0.0) -> Cycle:
        """Draft ``k`` levels (tokens of a chain; at most ``max_depth`` + 1) and verify all of them; 0 decodes plainly.
        A drafter that has nothing more to propose drafts fewer. Of a chain of copies in front of a head, which is
        drafted whole, ``k`` tokens are verified. ``alternatives`` and ``chance`` are those of ``verify``."""
        if k > 0:
            self.begin()
            for _ in range(k - 1):
                self.expand()
        return self.verify(k if self.tree.width == 1 else None, alternatives, chance)

    def _emit(self, emitted: list[int], traffic: Traffic, nodes: Drafted = NO_NODES, **counts: int) -> Cycle:
        """End a cycle and return it: append its tokens to the text, charge its cost, and drop the tree.

        Args:
            counts: the counts of ``Cycle`` by name; those left out are 0.
        """
        self.tokens.extend(emitted)
        self.finished = emitted[-1] in self.eos or len(self.tokens) == self.max_new_tokens
        if self.drafter and not self.finished:
            self.drafter.commit(emitted, self.verifier.features)
        self.clock.travel(traffic.seconds, "verify", traffic.simulated)
        seconds = self._cycle_seconds()
        counts = dict.fromkeys(("accepted", "drafted", "verified", "depth", "beside"), 0) | counts
        sent = {"bytes_up": traffic.bytes_up, "bytes_down": traffic.bytes_down}
        by = self.drafter.drafting if self.drafter else ""
        self.cycles.append(Cycle(tokens=emitted, seconds=seconds, nodes=nodes, drafter=by, **counts, **sent))
        self.tree.clear()
        self.drafting = False
        return self.cycles[-1]

    def _confidence(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities ``[n]`` of a chain's first tokens, and the entropies ``[n]`` of the distributions they
        are from; both are empty for a tree."""
        if not (self.tree.size and self.tree.is_chain):
            return NO_NODES.probabilities, NO_NODES.entropies
        steps = self.tree.scores.copy()
        steps[1:] -= self.tree.scores[:-1]
        return np.exp(steps[:n]), np.concatenate(self.tree.entropies)[:n]

    def _need_drafter(self) -> Drafter:
        if self.drafter is None:
            raise RuntimeError("this decoder has no drafter; open it with one, or call cycle(0) to decode plainly")
        return self.drafter

    def _cut(self, tokens: list[int]) -> list[int]:
        """Return the tokens up to the first EOS and to max_new_tokens."""
        tokens = tokens[: self.max_new_tokens - len(self.tokens)]
        for i, token in enumerate(tokens):
            if token in self.eos:
                return tokens[: i + 1]
        return tokens


def in_process(engine: Engine) -> TypeGuard[Decoder]:
    """Return True if an engine is a decoder over models of this process."""
    return isinstance(engine, Decoder) and isinstance(engine.verifier, LocalVerifier)


def over_models(engine: Engine) -> Decoder:
    """Return an engine that has to be a decoder over models of this process.

    Raises:
        ValueError: the engine is something else.
    """
    if not in_process(engine):
        raise ValueError(NOT_HERE)
    return engine


@functools.cache
def measured_plain(target: Transformer) -> float:
    """Measure the seconds of one plain decoding step after a short prompt: the median of 20 after a warm-up."""
    decoder = Decoder(LocalVerifier(target), None, WallClock(target.device), ())
    decoder.start([0] * 64, 32, np.random.default_rng(0))
    cycles = [decoder.verify(0) for _ in range(25)]
    return statistics.median(cycle.seconds["verify"] for cycle in cycles[5:])
