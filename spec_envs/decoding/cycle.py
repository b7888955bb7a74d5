"""The record of one cycle of decoding: the tokens it emitted, the nodes it verified, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Drafted:
    """The nodes that a cycle verified, for rendering and for observations.

    Attributes:
        tokens, parents, levels: ``[n]``.
        path: indices of the accepted nodes.
        probabilities, entropies: of a chain's tokens, without their alternatives, the probabilities, and the entropies
            in nats of the distributions that they were drafted from; empty for a tree.
    """

    tokens: np.ndarray
    parents: np.ndarray
    levels: np.ndarray
    path: list[int]
    probabilities: np.ndarray
    entropies: np.ndarray


EMPTY_INTS = np.zeros(0, np.int64)
NO_NODES = Drafted(EMPTY_INTS, EMPTY_INTS, EMPTY_INTS, [], np.zeros(0), np.zeros(0))


@dataclass(frozen=True)
class Cycle:
    """One draft-and-verify round.

    Attributes:
        tokens: what it emitted, cut at EOS and at max_new_tokens.
        accepted: number of emitted tokens that were drafted.
        drafted: number of candidates drafted, the alternatives of a chain not counted.
        verified: number of drafted nodes sent to the target (the root not counted), alternatives included.
        depth: number of expansions after the first level.
        seconds: by part (draft, verify, network, policy).
        nodes: the verified nodes.
        bytes_up, bytes_down: sent to the target and received from it over a network.
        unverified: number of emitted tokens that the target never saw.
        drafter: name of the one of several drafters that was asked; ``""`` where there is one only, or nobody was.
        beside: number of accepted tokens that are not of a chain but alternatives beside it, 0 or 1.
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
    drafter: str = ""
    beside: int = 0

    @property
    def emitted(self) -> int:
        """Number of emitted tokens."""
        return len(self.tokens)

    @property
    def scored(self) -> int:
        """Number of drafted tokens that the target verified (chains only), which are the accepted ones and the first
        rejected one, cut at the end of the text."""
        return min(self.verified, self.accepted + (self.emitted > self.accepted))


def merged(cycles: Sequence[Cycle]) -> Cycle:
    """Return several cycles as one: their tokens in a row, their counts and seconds added, and the nodes of the
    last."""
    if len(cycles) == 1:
        return cycles[0]
    added = ("accepted", "drafted", "verified", "bytes_up", "bytes_down", "unverified", "beside")
    counts = {name: sum(getattr(cycle, name) for cycle in cycles) for name in added}
    seconds = {part: sum(cycle.seconds[part] for cycle in cycles) for part in cycles[0].seconds}
    tokens = [token for cycle in cycles for token in cycle.tokens]
    return Cycle(tokens, depth=cycles[-1].depth, seconds=seconds, nodes=cycles[-1].nodes, **counts)
