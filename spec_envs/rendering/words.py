"""Say in words what happened in a cycle and in a whole text."""

from __future__ import annotations

from collections.abc import Sequence

from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.tree import Tree


def drafting(tree: Tree) -> str:
    """Return a line about a cycle under way."""
    if not tree.size:
        return "nothing is drafted yet"
    if tree.is_chain:
        return f"drafting · {counted(tree.size, 'token')} so far"
    return f"drafting · {counted(tree.expansions + 1, 'level')}, {tree.size} candidates so far"


def happened(cycle: Cycle, width: int) -> str:
    """Return a line about a cycle that has ended.

    Args:
        width: of the engine's tree; 1 where every cycle drafts a chain.
    """
    emitted = counted(cycle.emitted, "token")
    if cycle.unverified:
        return f"drafted and emitted {emitted} without verification"
    if not cycle.drafted:
        return f"nothing drafted · the target alone emitted {emitted}"
    if width == 1 or cycle.drafted == cycle.depth + 1:
        drafted, verified = f"drafted {counted(cycle.drafted, 'token')}", f"verified {cycle.verified}"
        if cycle.verified > cycle.drafted:
            verified += " with alternatives"
    else:
        drafted = f"drafted {counted(cycle.depth + 1, 'level')}"
        verified = f"verified {cycle.verified} of {cycle.drafted} candidates"
    return f"{drafted} · {verified} · accepted {cycle.accepted} · emitted {emitted}"


def by(cycle: Cycle) -> str:
    """Return who drafted a cycle; empty if nothing was drafted, or there is one drafter only."""
    return f"drafted by {cycle.drafter}" if cycle.drafter and cycle.drafted else ""


def sent(cycle: Cycle) -> str:
    """Return a line about the messages of a cycle; empty if there were none."""
    if not cycle.bytes_up:
        return ""
    milliseconds = 1000 * cycle.seconds["network"]
    return f"{size(cycle.bytes_up)} up · {size(cycle.bytes_down)} down · {milliseconds:.0f} ms on the network"


def totals(cycles: Sequence[Cycle], plain_rate: float) -> str:
    """Return a line about a text so far; its first token, which belongs to the prompt's forward, is not counted.

    Args:
        plain_rate: tokens per second of plain decoding.
    """
    if not cycles:
        return "the first token is the target's, from reading the prompt"
    emitted, forwards = sum(cycle.emitted for cycle in cycles), sum(map(target_forwards, cycles))
    seconds = sum(sum(cycle.seconds.values()) for cycle in cycles)
    parts = [counted(emitted, "token"), counted(forwards, "target forward")]
    if forwards:
        parts.append(f"{emitted / forwards:.2f} tokens per forward")
    if seconds:
        parts.append(f"{emitted / seconds / plain_rate:.2f}× the speed of plain decoding")
    return " · ".join(parts)


def target_forwards(cycle: Cycle) -> int:
    """Return the forwards of the target in a cycle: each adds one token of its own, which the end of a text may cut
    off."""
    return 0 if cycle.unverified else max(1, cycle.emitted - cycle.accepted)


def counted(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Return a number of bytes."""
    return f"{count} B" if count < 1000 else f"{count / 1000:.1f} kB"
