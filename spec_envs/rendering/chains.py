"""Draw a chain of candidates in rows, and below the first rejected one the token that the target put in its place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spec_envs.decoding.engine import Engine
from spec_envs.rendering.canvas import GREY, MARGIN, WIDTH, Canvas
from spec_envs.rendering.pills import PLAIN, STYLES, Pill, percent, style_of
from spec_envs.rendering.view import State, View, label

MIDDLE, LINE, BELOW = 250, 88, 34  # of all rows, the distance of two, and of the target's own token, in pixels
GAP, HEIGHT = 16, 24  # between tokens, and of tokens, in pixels
FEWEST_PLACES, MOST_PLACES, MOST_LINES = 6, 8, 3


def draw_chain(canvas: Canvas, engine: Engine, view: View, root: int) -> None:
    """Draw a chain, of a long one its beginning or where it was rejected.

    Args:
        root: the token from which it was drafted.
    """
    accepted, drafted = len(view.path), len(view.tokens)
    rows = Rows.of(engine.max_depth + 1)
    most = rows.places * rows.lines - 2  # the first place is the root's, and one is left for the target's own token
    last = accepted if view.states and view.states[0] is not State.DRAFTED else drafted
    begin = max(0, min(drafted - most, last - most + 2))
    shown = range(begin, min(drafted, begin + most))
    where = {node: rows.place(1 + i) for i, node in enumerate(shown)}
    first = rows.place(0)
    previous = first
    for node in shown:
        connect(canvas, previous, where[node], state=view.states[node])
        previous = where[node]
    first.draw(canvas, f"+{begin} more" if begin else label(engine, root), PLAIN)
    canvas.text(first.x + first.width / 2, first.y - 23, "last token", 10, GREY, align="center")
    for node in shown:
        pill, chance = where[node], view.chances[node]
        style = style_of(view.states[node], float(view.path_chances[node]))
        pill.draw(canvas, label(engine, int(view.tokens[node])), style)
        written = percent(float(chance))
        canvas.text(pill.x + pill.width / 2, pill.y - 23, written, 10, GREY, align="center")
    if drafted > shown.stop:
        canvas.text(previous.x, previous.y + 23, f"+ {drafted - shown.stop} more", 10, GREY)
    if view.own is not None:
        place = rows.place(1 + accepted - begin)
        if accepted < drafted:
            canvas.line((place.x + 14,) * 2, (place.y + 12, place.y + BELOW - 12), STYLES[State.OWN].edge, 2)
            place = place._replace(y=place.y + BELOW)
        else:
            connect(canvas, previous, place, State.OWN)
        place.draw(canvas, label(engine, view.own), STYLES[State.OWN])


@dataclass(frozen=True)
class Rows:
    """Rows of places for the tokens of a chain, in the middle of what is free for them.

    Attributes:
        places: in a row.
        lines: number of rows.
    """

    places: int
    lines: int

    @classmethod
    def of(cls, longest: int) -> Rows:
        """Return rows that a chain of that length fits, with its root and the target's own token."""
        places = min(MOST_PLACES, max(FEWEST_PLACES, longest + 2))
        return cls(places, min(MOST_LINES, math.ceil((longest + 2) / places)))

    def place(self, number: int) -> Pill:
        """Return the place of a token."""
        step = (WIDTH - 2 * MARGIN + GAP) / self.places
        line, column = divmod(number, self.places)
        y = MIDDLE + LINE * (line - (self.lines - 1) / 2)
        return Pill(MARGIN + step * column, y, step - GAP, HEIGHT, 12)


def connect(canvas: Canvas, before: Pill, after: Pill, state: State) -> None:
    """Connect two tokens of a row."""
    if before.y == after.y:
        canvas.line((before.x + before.width, after.x), (before.y, after.y), STYLES[state].edge, 1.6)
