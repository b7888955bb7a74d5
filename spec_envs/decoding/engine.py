"""The interface of everything that decodes: a decoder over models of this process, or a server of its own."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.tree import Tree
from spec_envs.text import Detokenizer


class Engine(Protocol):
    """Decodes one text at a time, in cycles of drafting and verification.

    Attributes:
        prompt, tokens: ids of the prompt, and of what was emitted (the first token included).
        max_new_tokens: most tokens of this text.
        cycles: finished cycles of this text.
        finished: True if there is no text to continue: none was begun, or EOS or max_new_tokens is reached.
        clock: charged for everything that takes time.
        eos: ids that end a text.
        context: most tokens of a text and of what may be drafted after it.
        max_depth: most expansions of a cycle.
        tree: candidates of the cycle under way; always empty where cycles are made elsewhere.
        detokenize: returns the text of token ids.
        times_itself: True if seconds are those that another process reports.
    """

    prompt: list[int]
    tokens: list[int]
    max_new_tokens: int
    cycles: list[Cycle]
    finished: bool
    clock: WallClock
    eos: frozenset[int]
    context: int
    max_depth: int
    tree: Tree
    detokenize: Detokenizer
    times_itself: bool

    @property
    def length(self) -> int:
        """Number of tokens of the whole text."""

    @property
    def temperature(self) -> float:
        """Sampling temperature of the target; 0 is greedy."""

    @property
    def device(self) -> torch.device:
        """Device on which the target computes."""

    @property
    def dtype(self) -> str:
        """Dtype in which the target computes, as tables report it."""

    def start(self, prompt: Sequence[int], max_new_tokens: int, rng: np.random.Generator) -> None:
        """Read a prompt and emit the first token; charged to ``prefill``, not to a cycle.

        Raises:
            ValueError: the prompt is empty or does not fit the context. There is no text then, not even the one before.
        """

    def cycle(self, k: int) -> Cycle:
        """Draft ``k`` levels and verify all of them; 0 decodes plainly."""

    def plain(self) -> Engine:
        """Return an engine of the same target and sampling that decodes plainly."""

    def separate(self) -> Engine:
        """Return an engine that another arm of a comparison may use without disturbing this one."""

    def close(self) -> None:
        """Release resources outside this process; may be called twice."""

    def plain_seconds(self) -> float:
        """Measure the seconds of one plain decoding step after a short prompt, without a network; measured once."""


class TextEngine:
    """The state of the text that an engine decodes: its tokens and its cycles.

    Attributes:
        prompt, tokens, max_new_tokens, cycles, finished, clock: as in ``Engine``.
    """

    def __init__(self, clock: WallClock):
        self.clock = clock
        self.prompt: list[int] = []
        self.tokens: list[int] = []
        self.cycles: list[Cycle] = []
        self.max_new_tokens, self.finished = 0, True

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def _begin(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Begin a text without a token."""
        self.prompt, self.max_new_tokens = token_ids(prompt), max_new_tokens
        self.tokens, self.cycles = [], []

    def _mark(self) -> None:
        """Begin to count the seconds of a cycle."""
        self._cycle_began = dict(self.clock.totals)

    def _cycle_seconds(self) -> dict[str, float]:
        """Return the seconds of the cycle that ends here, by part, and begin to count those of the next one."""
        seconds = self.clock.since(self._cycle_began)
        del seconds["prefill"]
        self._mark()
        return seconds

    def _check_alive(self) -> None:
        if self.finished:
            raise RuntimeError("the text has ended; call start() with the next prompt")


def token_ids(prompt: Sequence[int]) -> list[int]:
    """Return a prompt as a list of ids.

    Raises:
        TypeError: the prompt is something else, such as a text.
    """
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise TypeError(
            f"the prompt is {reprlib.repr(prompt)}; expected token ids, such as "
            "spec_envs.prompts.sets.encode(tokenizer, text) returns"
        ) from None


def check_room(prompt: Sequence[int], max_new_tokens: int, positions: int, context: int) -> None:
    """Refuse an empty prompt, and one that does not leave ``positions`` of the context free.

    Raises:
        TypeError: the prompt is not a sequence of token ids.
        ValueError: such a prompt, or ``max_new_tokens`` below 1.
    """
    token_ids(prompt)
    if not len(prompt):
        raise ValueError("the prompt is empty; expected at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if len(prompt) + positions > context:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and generation may need {positions} more, but the context is "
            f"{context}: shorten the prompt or lower max_new_tokens"
        )
