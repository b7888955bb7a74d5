"""The acceptance of a drafter on recorded conversations, by kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_envs.experiments.drafters.batches import Batch
from spec_envs.experiments.drafters.distilled import Objective
from spec_envs.experiments.drafters.recording import Example

SHARE = 0.25  # share of the rows from which more than one token is drafted
COUNTED = 4  # tokens of a chain that decide which weights are best


@dataclass(frozen=True)
class Acceptance:
    """The number of positions, and the share of them at which a chain of 1, 2, … tokens would be accepted.

    It is a lower bound of the acceptance in use, because here the tokens of the rest of the text compete as well.
    """

    positions: int
    chain_acceptance: list[float]

    @classmethod
    def of(cls, survived: Tensor, counted: Tensor) -> Acceptance:
        """Return the acceptance of chains that survived, of so many counted; ``[depth]`` each."""
        return cls(int(counted[0]), [round(share, 4) for share in (survived / counted.clamp(min=1)).tolist()])

    @property
    def accepted(self) -> float:
        """Mean number of accepted tokens of a chain of ``COUNTED``."""
        return sum(self.chain_acceptance[:COUNTED])


def evaluated(
    objective: Objective, examples: Sequence[Example], depth: int, pool: Executor
) -> tuple[Acceptance, dict[str, Acceptance]]:
    """Return the acceptance of chains of up to ``depth`` tokens, over all conversations and by kind.

    Every conversation is scored alone, because each has a vocabulary of its own.
    """

    def scored(number: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # of this thread
            generator = torch.Generator(objective.device).manual_seed(number)
            batch = Batch.of([examples[number]], objective.device, objective.reads_features)
            scores = objective(batch, depth, SHARE, generator, prompts=0.0)
        return scores.survived.cpu(), scores.counted.cpu()

    objective.trained.eval()
    try:
        found = list(pool.map(scored, range(len(examples))))
    finally:
        objective.trained.train()
    sums: dict[str, list[Tensor]] = defaultdict(lambda: [torch.zeros(depth), torch.zeros(depth)])
    for example, figures in zip(examples, found, strict=True):
        sums[example.kind] = [total + figure for total, figure in zip(sums[example.kind], figures, strict=True)]
    kinds = {kind: Acceptance.of(*sums[kind]) for kind in sorted(sums)}
    return Acceptance.of(*(sum(parts) for parts in zip(*sums.values(), strict=True))), kinds


def mean_accepted(kinds: dict[str, Acceptance]) -> float:
    """Return the mean over kinds of the accepted tokens of a chain, in which every kind counts the same."""
    return sum(acceptance.accepted for acceptance in kinds.values()) / len(kinds)
