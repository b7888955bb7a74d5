"""Rewards of a decision, by name; a control lists those that it offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Decision(NamedTuple):
    """The yield and the cost of a decision: numbers, or arrays with one of each per environment.

    Attributes:
        counted: tokens that the cycle counts for; 0 where the decision ended none.
        emitted, accepted: tokens of the cycle; 0 where the decision ended none.
        seconds: seconds of the decision.
        cycle_seconds: seconds of the whole cycle; 1 where the decision ended none.
        pace: tokens per second that a second costs.
    """

    counted: Any
    emitted: Any
    accepted: Any
    seconds: Any
    cycle_seconds: Any
    pace: Any


Reward = Callable[[Decision], Any]


def saved(decision: Decision) -> Any:
    """Return the emitted tokens − `pace` · seconds of the step."""
    return decision.counted - decision.pace * decision.seconds


def ltd(decision: Decision) -> Any:
    """Return the emitted tokens / (100 · seconds of the cycle) where the step ends a cycle, else 0; needs
    `episode="cycle"` (Learning to Draft, arXiv 2603.01639)."""
    return decision.emitted / (100 * decision.cycle_seconds)


def rl_adapter(decision: Decision) -> Any:
    """Return the accepted tokens / seconds of the cycle; needs `episode="cycle"` (published for a link)."""
    return decision.accepted / decision.cycle_seconds


def accepted(decision: Decision) -> Any:
    """Return the number of drafted tokens that the target accepted."""
    return decision.accepted


RATES = {"ltd", "rl_adapter"}  # rewards that divide tokens by seconds; they only make sense for one cycle at a time
