"""Show a decoder's text and its last cycle, as coloured text or as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spec_envs.decoding.cycle import Cycle, Drafted
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.tree import ROOT
from spec_envs.text import TextStream, after, printable

GREEN, RED, BOLD, RESET = "\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"
DRAWN = 60  # most nodes of a tree that are shown


def ansi(decoder: Engine) -> str:
    """Return the text with drafted tokens green and the target's own bold, then the last cycle's tree, rejected nodes
    red."""
    stream = TextStream(decoder.detokenize)
    parts = [(BOLD, stream.push(decoder.tokens[:1]))]
    for cycle in decoder.cycles:
        parts.append((GREEN, stream.push(cycle.tokens[: cycle.accepted])))
        parts.append((BOLD, stream.push(cycle.tokens[cycle.accepted :])))
    parts.append((parts[-1][0], stream.finish()))
    lines = ["".join(f"{colour}{printable(piece)}{RESET}" for colour, piece in parts if piece)]
    if decoder.cycles:
        last = decoder.cycles[-1]
        lines.append(f"-- depth {last.depth}, {last.verified} verified, {last.accepted} accepted --")
        lines.extend(tree_lines(last.nodes, labels(decoder, last)))
    return "\n".join(lines)


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


def picture(decoder: Engine) -> np.ndarray:
    """Return the tail of the text above the last cycle's tree, ``[480, 800, 3]`` uint8."""
    figure = Figure(figsize=(8, 4.8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    text, tree = figure.subplots(2, 1, height_ratios=[1, 4])
    tail = drawn(printable(decoder.detokenize(decoder.tokens[-60:])))
    text.text(0, 0.5, tail, wrap=True, fontsize=9, va="center", family="monospace")
    text.set_axis_off()
    tree.set_axis_off()
    if decoder.cycles:
        draw_tree(tree, decoder.cycles[-1], labels(decoder, decoder.cycles[-1]))
    figure.tight_layout()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def drawn(text: str) -> str:
    """Return a text in one line, so that matplotlib draws it unchanged."""
    return text.replace("\n", "⏎").replace("$", r"\$")


def draw_tree(axes: Any, cycle: Cycle, labels: list[str]) -> None:
    """Draw nodes by level from left to right, accepted ones green."""
    nodes, accepted = cycle.nodes, set(cycle.nodes.path)
    where: dict[int, tuple[float, float]] = {ROOT: (-1.0, 0.0)}
    for level in range(int(nodes.levels.max(initial=-1)) + 1):
        members = np.flatnonzero(nodes.levels == level)
        for rank, node in enumerate(members.tolist()):
            where[node] = (float(level), (len(members) - 1) / 2 - rank)
    for node, (x, y) in where.items():
        if node == ROOT:
            axes.plot(x, y, "ks", markersize=5)
            continue
        parent_x, parent_y = where[int(nodes.parents[node])]
        colour = "tab:green" if node in accepted else "tab:red"
        axes.plot([parent_x, x], [parent_y, y], color=colour, alpha=0.9 if node in accepted else 0.25)
        axes.plot(x, y, "o", color=colour, markersize=3)
        if len(nodes.tokens) <= 30 or node in accepted:
            axes.annotate(drawn(labels[node]), (x, y), fontsize=7, xytext=(3, 2), textcoords="offset points")
    axes.set_title(
        f"depth {cycle.depth}, {cycle.verified} verified, {cycle.accepted} accepted, {cycle.emitted} emitted",
        fontsize=9,
    )
