"""Draw a tree of candidates: a column for each level, the best candidates of a level from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spec_envs.decoding.engine import Engine
from spec_envs.decoding.tree import ROOT
from spec_envs.rendering.canvas import GREY, MARGIN, WIDTH, Canvas
from spec_envs.rendering.pills import PLAIN, Pill, Style, style_of
from spec_envs.rendering.view import State, View, label

TOP, ROW, ROWS = 154, 30, 8  # where the first row is, the distance of two, and how many a level has
COLUMNS = 6  # the fewest
WIDEST, GAP, HEIGHT = 118, 16, 22  # of pills, in pixels
ORDER = (State.LEFT_OUT, State.DRAFTED, State.REJECTED, State.ACCEPTED, State.OWN)  # of drawing, over each other
OWN = -2  # stands for the target's own token among ids of candidates


@dataclass(frozen=True)
class Layout:
    """Which candidates are drawn, and where.

    Attributes:
        columns: ids by level, from top to bottom.
        hidden: number of candidates of each level that are not drawn.
    """

    columns: list[list[int]]
    hidden: list[int]

    @classmethod
    def of(cls, view: View) -> Layout:
        """Show the accepted candidates, then those of the most probable paths; of each only with its parent."""
        levels = int(view.levels.max(initial=-1)) + 1
        own_level = len(view.path) if view.own is not None else -1
        columns: list[list[int]] = []
        hidden: list[int] = []
        for level in range(max(levels, own_level + 1)):
            members = np.flatnonzero(view.levels == level).tolist()
            above = columns[-1] if columns else [ROOT]
            found = [node for node in members if view.parents[node] in above]
            found.sort(key=lambda node: (node not in view.path, -view.scores[node]))
            rows = ROWS - (level == own_level)
            hidden.append(len(members) - len(found[:rows]))
            shown = found[:rows] + [OWN] * (level == own_level)
            columns.append(sorted(shown, key=lambda node: cls._order(view, node, above)))
        return cls(columns, hidden)

    @staticmethod
    def _order(view: View, node: int, above: list[int]) -> tuple[int, float]:
        """Return what a level is sorted by: the place of the parent, then the probability of the path, the target's own
        token first."""
        parent, score = parent_of(view, node), 1.0 if node == OWN else float(view.scores[node])
        return above.index(parent), -score


def parent_of(view: View, node: int) -> int:
    """Return the parent of a candidate, or of the target's own token."""
    if node == OWN:
        return view.path[-1] if view.path else ROOT
    return int(view.parents[node])


def draw_tree(canvas: Canvas, engine: Engine, view: View, root: int) -> None:
    """Draw a tree.

    Args:
        root: the token from which it was drafted.
    """
    layout = Layout.of(view)
    step = (WIDTH - 2 * MARGIN + GAP) / max(COLUMNS, len(layout.columns) + 1)
    width = min(WIDEST, step - GAP)
    size = 12 if width > 80 else 10 if width > 46 else 9

    def note(x: float, y: float, text: str) -> None:
        canvas.text(x + width / 2, y, text, 10, GREY, align="center")

    pills = {ROOT: Pill(MARGIN, TOP + ROW * (ROWS - 1) / 2, width, HEIGHT, size)}
    for level, column in enumerate(layout.columns):
        x = MARGIN + step * (level + 1)
        for row, node in enumerate(column):
            y = TOP + ROW * (row + (ROWS - len(column)) / 2)
            pills[node] = Pill(x, y, width, HEIGHT, size)
        if column != [OWN]:
            note(x, TOP - 22, f"level {level + 1}" if width > 46 else f"{level + 1}")
        if more := layout.hidden[level]:
            note(x, pills[column[-1]].y + ROW - 5, f"+ {more} more" if width > 60 else f"+{more}")
    note(MARGIN, TOP - 22, "last token" if width > 60 else "last")
    drawn = sorted((node for node in pills if node != ROOT), key=lambda node: ORDER.index(state_of(view, node)))
    styles = {n: style_of(state_of(view, n), 1.0 if n == OWN else float(view.path_chances[n])) for n in drawn}
    for node in drawn:
        wide = state_of(view, node) in (State.ACCEPTED, State.OWN)
        connect(canvas, pills[parent_of(view, node)], pills[node], styles[node], 2.2 if wide else 0.8)
    pills[ROOT].draw(canvas, label(engine, root), PLAIN)
    for node in drawn:
        token, chance = (view.own, 1.0) if node == OWN else (int(view.tokens[node]), float(view.chances[node]))
        assert token is not None  # where it is drawn, there is one
        pills[node].draw(canvas, label(engine, token), styles[node], chance)


def state_of(view: View, node: int) -> State:
    """Return the state of a candidate, or of the target's own token."""
    return State.OWN if node == OWN else view.states[node]


def connect(canvas: Canvas, parent: Pill, child: Pill, style: Style, width: float) -> None:
    """Connect a candidate with its parent."""
    start, end = parent.x + parent.width, child.x
    bend = 0.2 * (end - start)
    canvas.line((start, start + bend, end - bend, end), (parent.y, parent.y, child.y, child.y), style.edge, width)
