"""Decode texts under the control of an agent, as an environment does, without an environment."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from spec_envs.controls.base import Control
from spec_envs.controls.policy import Policy, Predictor
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.engine import Engine, token_ids
from spec_envs.text import TextStream


@dataclass
class Generation:
    """A text under way. Iterate over it for the token ids of each cycle, or over ``pieces()`` for its text.

    Attributes:
        tokens: ids emitted so far, the prefill's first token included.
        cycles: finished cycles.
        seconds: all seconds after the prefill: drafting, verification, decisions and everything around them, and those
            of a simulated network. Under a priced clock, or on a server that times itself, the seconds charged.
        prefill_seconds: seconds of the prompt and the first token.
        actions: decisions taken, in order.
    """

    decoder: Engine
    policy: Policy | None
    prompt: list[int]
    max_new_tokens: int
    rng: np.random.Generator
    task: str = ""
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    actions: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Ids emitted so far."""
        return self.decoder.tokens

    @property
    def cycles(self) -> list[Cycle]:
        """Finished cycles."""
        return self.decoder.cycles

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the cycles per second; NaN before the first cycle."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds else float("nan")

    def __iter__(self) -> Iterator[list[int]]:
        decoder, clock = self.decoder, self.decoder.clock
        self.seconds, self.actions = 0.0, []
        decoder.start(self.prompt, self.max_new_tokens, self.rng)
        if self.policy:
            self.policy.reset(self.rng, self.task)
        self.prefill_seconds = clock.totals["prefill"]
        yield decoder.tokens[:1]
        while not decoder.finished:
            mark, simulated, began = dict(clock.totals), clock.simulated, time.perf_counter()
            cycle = self._cycle()
            timed = clock.priced or decoder.times_itself
            elapsed = time.perf_counter() - began + clock.simulated - simulated
            spent = sum(clock.since(mark).values()) if timed else elapsed
            self.seconds += spent
            yield cycle.tokens

    def _cycle(self) -> Cycle:
        """Make decisions until a cycle ends; return it."""
        if self.policy is None:
            return self.decoder.cycle(0)
        while True:
            action = self.policy.decide(self.decoder)
            self.actions.append(action)
            if cycle := self.policy.control.act(self.decoder, action):
                if self.policy.learning:
                    self.policy.learn(self.decoder, action, cycle)
                return cycle

    def pieces(self) -> Iterator[str]:
        """Generate, and yield the text as it comes. Together the pieces are the text of all tokens; characters come out
        whole, except for one that the text ends within."""
        stream = TextStream(self.decoder.detokenize)
        for ids in self:
            yield stream.push(ids)
        yield stream.finish()

    def run(self) -> Generation:
        """Generate to the end; return this generation."""
        for _ in self:
            pass
        return self


def generate(
    decoder: Engine,
    control: Control | None,
    agent: Predictor | None,
    prompt: Sequence[int],
    max_new_tokens: int = 256,
    seed: int | None = None,
    task: str = "",
    learn: bool = False,
) -> Generation:
    """Decode a prompt under an agent's control; without control and agent, plainly.

    Args:
        decoder: from ``control.open`` or ``spec_envs.load_decoder``, with the control's width and max_depth.
        control, agent: the pair that ``spec_envs.agents.load(run)`` returns; the agent may be a model of
            Stable-Baselines3, whose decisions are then charged no seconds.
        prompt: token ids (``spec_envs.prompts.sets.encode``).
        max_new_tokens: most tokens to emit.
        seed: seed of sampling, at a temperature above 0.
        task: kind of prompt, for controls that show it: a name of ``spec_envs.controls.observation.entries.TASKS``, or any other.
        learn: True lets the agent explore and continue to learn from every cycle, which ``rl-adapter`` can, and ``dvi``
            and ``reinforce`` after ``agent.bind(decoder)``.

    Returns:
        A :class:`Generation`: iterate over it or its ``pieces()`` to stream, or call ``run()``.

    Raises:
        TypeError: a prompt that is not of token ids, a control that is none, an agent without ``predict``, or only one
            of control and agent.
        ValueError: control, agent and decoder that do not go together.
    """
    ids, policy = token_ids(prompt), None
    if (control is None) != (agent is None):
        given, lacking = ("an agent", "control") if control is None else ("a control", "agent")
        raise TypeError(f"there is {given}, but {lacking} is None; give both, or None for both to decode plainly")
    if control is not None and agent is not None:
        if not isinstance(control, Control):
            raise TypeError(
                f"control is {control!r}; expected a Control, which an environment has as .unwrapped.control"
            )
        policy = Policy(control, agent, learn)
        if (decoder.tree.width, decoder.max_depth) != (control.width, control.max_depth):
            raise ValueError(
                f"the decoder drafts width {decoder.tree.width} and max_depth {decoder.max_depth}, the control expects "
                f"{control.width} and {control.max_depth}; pass them to load_decoder"
            )
    return Generation(decoder, policy, ids, max_new_tokens, np.random.default_rng(seed), task)
