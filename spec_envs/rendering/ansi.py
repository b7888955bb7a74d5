"""Show a decoder's text and its last cycle as coloured text."""

from __future__ import annotations

import numpy as np

from spec_envs.decoding.cycle import Cycle, Drafted
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.tree import ROOT
from spec_envs.rendering.words import by, drafting, happened
from spec_envs.text import TextStream, after, printable

GREEN, RED, BOLD, RESET = "\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"
DRAWN = 60  # most nodes of a tree that are shown


def ansi(decoder: Engine, last: Cycle | None) -> str:
    """Return the text with drafted tokens green and the target's own bold, then what is happening in words.

    Args:
        last: the cycle that has just ended, whose nodes are listed, rejected ones red; None for the cycle under way.
    """
    stream = TextStream(decoder.detokenize)
    parts = [(BOLD, stream.push(decoder.tokens[:1]))]
    for cycle in decoder.cycles:
        parts.append((GREEN, stream.push(cycle.tokens[: cycle.accepted])))
        parts.append((BOLD, stream.push(cycle.tokens[cycle.accepted :])))
    parts.append((parts[-1][0], stream.finish()))
    text = "".join(f"{colour}{printable(piece)}{RESET}" for colour, piece in parts if piece)
    if last is None:
        return f"{text}\n-- {drafting(decoder.tree)} --"
    caption = f"-- {' · '.join(filter(None, (happened(last, decoder.tree.width), by(last))))} --"
    return "\n".join([text, caption, *tree_lines(last.nodes, labels(decoder, last))])


def labels(decoder: Engine, cycle: Cycle) -> list[str]:
    """Return the text of every node of a cycle, with the leading space that it has within a text."""
    before = decoder.tokens[0]
    return [printable(after(decoder.detokenize, before, token)) for token in cycle.nodes.tokens.tolist()]


def tree_lines(nodes: Drafted, labels: list[str]) -> list[str]:
    """Return one line per node, indented by level, children below their parent."""
    lines: list[str] = []
    accepted = set(nodes.path)

    def add(parent: int) -> None:
        for node in np.flatnonzero(nodes.parents == parent):
            if len(lines) == DRAWN:
                return
            colour = GREEN if int(node) in accepted else RED
            lines.append(f"{'  ' * nodes.levels[node]}{colour}{labels[node]!r}{RESET}")
            add(int(node))

    add(ROOT)
    if len(nodes.tokens) > DRAWN:
        lines.append(f"… {len(nodes.tokens) - DRAWN} more")
    return lines
