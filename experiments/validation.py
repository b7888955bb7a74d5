"""Validations: an agent is measured on validation prompts while it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from spec_envs.agents import load
from spec_envs.agents.base import Agent
from spec_envs.agents.exits.base import ExitAgent
from spec_envs.agents.loading import cost_table
from spec_envs.controls import Control, Policy, make_control
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.engine import Engine
from spec_envs.experiments.exits.evaluation import Acceptance, exit_decoder, exit_drafter
from spec_envs.experiments.measure.arms import Encoded, decoded, run_arms
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts
from spec_envs.experiments.measure.static import static_chain
from spec_envs.experiments.measure.statistics import ratio
from spec_envs.experiments.runs import RunConfig

VALIDATED_K = 4  # drafted tokens per cycle in the validation of an exit


class Validation(Protocol):
    """Returns figures of an agent by name. Models are loaded at the first call."""

    def __call__(self, agent: Any) -> dict[str, float]: ...

    def close(self) -> None: ...


class Speedup:
    """Measures the speedup of a policy over plain decoding.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: Path, config: RunConfig):
        self.folder, self.config = folder, config
        self.opened: list[Engine] = []

    @cached_property
    def control(self) -> Control:
        """A control apart from the environment's, because a validation must not disturb the current episode."""
        control = make_control(self.config.id, self.config.env)
        if self.config.partner:
            control.compose(*load(self.config.partner))
        if control.cost_features:
            control.costs = cost_table(self.folder, self.config.env)
        return control

    @cached_property
    def decoders(self) -> tuple[Engine, Engine]:
        """A decoder that follows the agent, and one that decodes plainly."""
        decoder = decoder_for(self.config.env, self.control)
        self.opened = [decoder, decoder.plain()]
        return decoder, self.opened[1]

    @cached_property
    def prompts(self) -> Sequence[Encoded]:
        return encoded_prompts(self.config.env, "validation", self.config.eval_prompts)

    def __call__(self, agent: Agent) -> dict[str, float]:
        decoder, plain = self.decoders
        arms = {"plain": decoded(plain, None), "agent": decoded(decoder, Policy(self.control, agent))}
        most = self.config.env.get("max_new_tokens", 128)
        samples = run_arms(arms, self.prompts, most, "validation", quiet=True)  # within the bar of the training
        return {"speedup": ratio(samples["agent"], samples["plain"]).value}

    def close(self) -> None:
        for decoder in self.opened:
            decoder.close()


class ExitAcceptance:
    """Measures the acceptance rate of an early exit's drafts, and its emitted tokens per cycle."""

    def __init__(self, folder: Path, config: RunConfig):
        self.env, self.count = config.table_env, config.eval_prompts

    @cached_property
    def decoder(self) -> Decoder:
        return exit_decoder(self.env, VALIDATED_K)

    @cached_property
    def prompts(self) -> Sequence[Encoded]:
        return encoded_prompts(self.env, "validation", self.count)

    def __call__(self, agent: ExitAgent) -> dict[str, float]:
        exit_drafter(self.decoder).use(agent.adapter.snapshot())
        chain = {"exit": decoded(self.decoder, static_chain(VALIDATED_K, VALIDATED_K))}
        samples = run_arms(chain, self.prompts, self.env.get("max_new_tokens", 128), "validation", quiet=True)
        return vars(Acceptance.of(samples["exit"]))

    def close(self) -> None:
        pass


VALIDATIONS: dict[str, Callable[[Path, RunConfig], Validation]] = {"speedup": Speedup, "acceptance": ExitAcceptance}
