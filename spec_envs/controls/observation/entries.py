"""Entries of observations that several problems show, and how each is read from a live decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, cast

import numpy as np

from spec_envs.controls.observation.recorded import (
    DEPTH_UNIT,
    Reader,
    recorded_depth,
    recorded_expansions,
    recorded_frontier,
    recorded_gains,
    recorded_survival,
)
from spec_envs.controls.observation.tree_formulas import gains, survival
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import Copier
from spec_envs.decoding.drafters.lookup import LONGEST
from spec_envs.decoding.engine import Engine

CONTEXT_UNIT = 4096  # tokens of text that the observation shows as 1
LENGTH_UNIT = 1000  # tokens of text that the published observation shows as 1
WINDOWS = (4, 16)  # cycles over which acceptance is observed
# The prompt sets that observations tell apart. All others are "any other", since a policy fits one size of observation.
TASKS = ("mt_bench", "gsm8k", "cnndm", "xsum", "humaneval")


class Entry(NamedTuple):
    """A named range of the observation vector.

    Attributes:
        size: numbers in it.
        low, high: their bounds.
        read: returns its value at a live decoder: a number, or up to ``size`` of them; the rest are 0.
        recorded: returns the same from a trace; None where it depends on more than what the cycle under way has
            drafted.
    """

    name: str
    size: int
    low: float
    high: float
    read: Callable[[Any], Any]
    recorded: Reader | None = None


def survival_entry(max_depth: int) -> Entry:
    """Return the range that shows how probably the text passes through each level of the tree."""
    return Entry("survival", max_depth + 1, 0.0, 1.0, read_survival, recorded_survival)


def frontier_entry(width: int) -> Entry:
    """Return the range that shows the nodes which the next expansion would feed."""
    return Entry("frontier", width, 0.0, 1.0, read_frontier, recorded_frontier)


def gains_entry(budgets: Sequence[int]) -> Entry:
    """Return the range that shows how many accepted tokens each budget is expected to add."""
    sizes = np.array(budgets)
    recorded = partial(recorded_gains, budgets=sizes)
    return Entry("gains", len(sizes), 0.0, 1.0, partial(read_gains, budgets=sizes), recorded)


def progress_entries() -> list[Entry]:
    """Return the ranges that show how far the tree, the text and the last cycles have come."""
    return [
        Entry("expansions", 1, 0.0, 1.0, read_expansions, recorded_expansions),
        Entry("recent", len(WINDOWS), 0.0, 1.0, read_recent),
        *text_entries(),
    ]


def text_entries() -> list[Entry]:
    """Return the ranges that show how long the text is."""
    return [
        Entry("position", 1, 0.0, 1.0, read_position),
        Entry("context", 1, 0.0, 1.0, read_context),
    ]


def ltd_entries(
    scores: int, read_scores: Callable[[Decoder], Any], recorded_scores: Reader, repeats: int
) -> list[Entry]:
    """Return the observation of Learning to Draft (arXiv 2603.01639): scores, then length and depth, repeated."""
    lowest = -1000.0  # a floor below any path log-probability in float32
    return [
        Entry("scores", scores, lowest, 0.0, read_scores, recorded_scores),
        Entry("length", repeats, 0.0, 1000.0, partial(read_length, repeats=repeats)),
        Entry("depth", repeats, 0.0, 100.0, partial(read_depth, repeats=repeats), recorded_depth),
    ]


def read_survival(decoder: Decoder) -> np.ndarray:
    """Return the drafter's probability that the text passes through each level grown, ``[levels]``."""
    tree = decoder.tree
    return survival(tree.scores, tree.level_starts) if tree.size else np.zeros(0)


def read_frontier(decoder: Decoder) -> np.ndarray:
    """Return the path probabilities of the nodes that the next expansion would feed, best first."""
    probabilities: np.ndarray = np.exp(decoder.tree.scores[decoder.tree.frontier])
    return probabilities


def read_gains(decoder: Decoder, budgets: np.ndarray) -> np.ndarray:
    """Return ``gains`` of the tree under way, ``[budgets]``."""
    return gains(decoder.tree.scores, budgets, decoder.max_depth)


def read_expansions(decoder: Decoder) -> float:
    """Return the expansions so far as a share of the most there can be."""
    return decoder.tree.expansions / decoder.max_depth


def read_recent(decoder: Decoder) -> list[float]:
    """Return the accepted tokens per cycle over the last 4 and the last 16 cycles, in units of the deepest path."""
    deepest = decoder.max_depth + 1
    recent = [decoder.cycles[-n:] for n in WINDOWS]
    return [sum(cycle.accepted for cycle in cycles) / max(1, len(cycles)) / deepest for cycles in recent]


def read_position(decoder: Engine) -> float:
    """Return the emitted tokens as a share of ``max_new_tokens``."""
    return len(decoder.tokens) / decoder.max_new_tokens


def read_context(decoder: Engine) -> float:
    """Return the length of the text in units of 4096 tokens."""
    return decoder.length / CONTEXT_UNIT


def read_length(decoder: Decoder, repeats: int) -> np.ndarray:
    """Return the length of the text in units of 1000 tokens, ``[repeats]``."""
    return np.full(repeats, decoder.length / LENGTH_UNIT)


def read_depth(decoder: Decoder, repeats: int) -> np.ndarray:
    """Return the expansions so far in units of ten, ``[repeats]``."""
    return np.full(repeats, decoder.tree.expansions / DEPTH_UNIT)


def read_match(decoder: Decoder) -> float:
    """Return how many of the text's last tokens occurred in it before, as a share of the most that are counted. It is 0
    without prompt lookup."""
    drafter = copier(decoder)
    return match_of(drafter) if drafter else 0.0


def match_of(drafter: Copier) -> float:
    """Return how many of the text's last tokens occurred in it before, as a share of the most that are counted."""
    return min(1.0, drafter.matched() / LONGEST)


def copies(decoder: Decoder) -> bool:
    """Return whether the next token of the chain under way would be copied."""
    drafter = copier(decoder)
    return drafter is not None and drafter.source(decoder.tree.tokens.tolist()) is not None


def copier(decoder: Decoder) -> Copier | None:
    """Return the drafter of an unfinished text, if it may copy."""
    kind: type = type(decoder.drafter)
    return None if decoder.finished or not may_copy(kind) else cast(Copier, decoder.drafter)


@cache
def may_copy(drafter: type) -> bool:
    """Return whether drafters of a type are copiers. Cached because the check is slow and made at every decision."""
    return issubclass(drafter, Copier)


def acceptance(cycles: Sequence[Cycle]) -> float:
    """Return accepted over drafted tokens, alternatives beside them not counted: a ratio of sums, not a mean of ratios."""
    drafted = sum(cycle.drafted for cycle in cycles)
    return sum(cycle.accepted - cycle.beside for cycle in cycles) / drafted if drafted else 0.0


def one_hot(name: str, names: tuple[str, ...]) -> list[float]:
    """Return 1 at the name's place and 0 elsewhere; an unknown name has the last place."""
    at = names.index(name) if name in names else len(names) - 1
    return [float(i == at) for i in range(len(names))]


def mean(values: np.ndarray) -> float:
    """Return the mean; 0 if there are no values."""
    return float(values.mean()) if len(values) else 0.0
