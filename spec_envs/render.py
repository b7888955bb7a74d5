"""What a decoder is doing, as coloured text or as a picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spec_envs.decoding.decoder import Cycle, Decoder, Drafted
from spec_envs.decoding.tree import ROOT

GREEN, RED, BOLD, RESET = "\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"
DRAWN = 60  # nodes shown of a tree
Detokenize = Callable[[list[int]], str]


def ansi(decoder: Decoder) -> str:
    """The text with drafted tokens green and the target's own bold, then the last cycle's tree, refused nodes red."""
    parts = [f"{BOLD}{decoder.detokenize(decoder.tokens[:1])}{RESET}"]
    for cycle in decoder.cycles:
        drafted, own = cycle.tokens[: cycle.accepted], cycle.tokens[cycle.accepted :]
        if drafted:
            parts.append(f"{GREEN}{decoder.detokenize(drafted)}{RESET}")
        if own:
            parts.append(f"{BOLD}{decoder.detokenize(own)}{RESET}")
    lines = ["".join(parts)]
    if decoder.cycles:
        last = decoder.cycles[-1]
        lines.append(f"-- depth {last.depth}, {last.verified} verified, {last.accepted} accepted --")
        lines.extend(tree_lines(last.nodes, decoder.detokenize))
    return "\n".join(lines)


def tree_lines(nodes: Drafted, detokenize: Detokenize) -> list[str]:
    """One line per node, indented by level, children below their parent."""
    lines: list[str] = []
    accepted = set(nodes.path)

    def add(parent: int) -> None:
        for node in np.flatnonzero(nodes.parents == parent):
            if len(lines) == DRAWN:
                return
            colour = GREEN if int(node) in accepted else RED
            lines.append(f"{'  ' * nodes.levels[node]}{colour}{detokenize([int(nodes.tokens[node])])!r}{RESET}")
            add(int(node))

    add(ROOT)
    if len(nodes.tokens) > DRAWN:
        lines.append(f"… {len(nodes.tokens) - DRAWN} more")
    return lines


def picture(decoder: Decoder) -> np.ndarray:
    """The tail of the text above the last cycle's tree, ``[480, 800, 3]`` uint8."""
    figure = Figure(figsize=(8, 4.8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    text, tree = figure.subplots(2, 1, height_ratios=[1, 4])
    tail = decoder.detokenize(decoder.tokens[-60:]).replace("\n", "⏎").replace("$", r"\$")
    text.text(0, 0.5, tail, wrap=True, fontsize=9, va="center", family="monospace")
    text.set_axis_off()
    tree.set_axis_off()
    if decoder.cycles:
        draw_tree(tree, decoder.cycles[-1], decoder.detokenize)
    figure.tight_layout()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_tree(axes, cycle: Cycle, detokenize: Detokenize) -> None:
    """Nodes by level from left to right, accepted ones green."""
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
            label = detokenize([int(nodes.tokens[node])]).replace("\n", "⏎").replace("$", r"\$")
            axes.annotate(label, (x, y), fontsize=7, xytext=(3, 2), textcoords="offset points")
    axes.set_title(
        f"depth {cycle.depth}, {cycle.verified} verified, {cycle.accepted} accepted, {cycle.emitted} emitted",
        fontsize=9,
    )
