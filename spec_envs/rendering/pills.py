"""A token in a box that shows what became of it."""

from __future__ import annotations

from typing import NamedTuple

from spec_envs.rendering.canvas import (
    ADVANCE,
    BLUE,
    DARK,
    GREEN,
    GREY,
    MARGIN,
    PALE,
    RED,
    WHITE,
    WIDTH,
    Canvas,
    cut,
    tinted,
)
from spec_envs.rendering.view import State


class Style(NamedTuple):
    """How a state is drawn: a mark, which tells states apart without colours, and colours of letters, face and edge."""

    mark: str
    letters: str
    face: str
    edge: str


STYLES = {
    State.DRAFTED: Style("", DARK, WHITE, BLUE),
    State.ACCEPTED: Style("✓", WHITE, GREEN, GREEN),
    State.REJECTED: Style("✗", RED, tinted(RED, 0.08), RED),
    State.LEFT_OUT: Style("", GREY, WHITE, PALE),
    State.OWN: Style("", WHITE, DARK, DARK),
}


def style_of(state: State, chance: float) -> Style:
    """Return how a candidate is drawn; one that is not verified yet the darker, the more probable its path is."""
    if state is not State.DRAFTED:
        return STYLES[state]
    return STYLES[state]._replace(face=tinted(BLUE, 0.04 + 0.36 * chance), edge=tinted(BLUE, 0.4 + 0.6 * chance))


PLAIN = Style("", GREY, tinted(PALE, 0.3), PALE)  # the last token of the text, from which drafting begins
LEGEND = ((State.DRAFTED, 78), (State.ACCEPTED, 92), (State.REJECTED, 88), (State.LEFT_OUT, 104), (State.OWN, 124))


class Pill(NamedTuple):
    """Where a token is drawn: the middle of its left edge, its size, and the size of its letters, in pixels."""

    x: float
    y: float
    width: float
    height: float
    size: float

    def draw(self, canvas: Canvas, text: str, style: Style, chance: float = 1.0) -> None:
        """Draw a token, with its probability if there is room and it is below 1."""
        dashed = style == STYLES[State.LEFT_OUT]
        canvas.box(self.x, self.y - self.height / 2, self.width, self.height, style.face, style.edge, dashed=dashed)
        mark = f"{style.mark} " if style.mark else ""
        written = percent(chance) if self.width >= 88 else ""
        room = self.width - 10 - (30 if written else 0)
        label = cut(mark + text, int(room / (self.size * ADVANCE)))
        bold = style.letters == WHITE
        canvas.text(self.x + 6, self.y, label, self.size, style.letters, bold=bold, mono=True)
        if written:
            colour = style.letters if bold else GREY
            canvas.text(self.x + self.width - 5, self.y, written, self.size - 2, colour, align="right")


def draw_legend(canvas: Canvas, y: float) -> None:
    """Draw what the boxes mean, in one line."""
    x = float(MARGIN)
    for state, width in LEGEND:
        style = style_of(state, 0.4)
        Pill(x, y, 16, 14, 10).draw(canvas, "", style._replace(mark=""))
        canvas.text(x + 8, y, style.mark, 10, style.letters, align="center")
        canvas.text(x + 22, y, state.value, 11, GREY)
        x += width + 12
    canvas.text(WIDTH - MARGIN, y, "%: the drafter's probability", 11, GREY, align="right")


def percent(chance: float) -> str:
    """Return a probability as it is written; nothing for 1, since such a token was copied or chosen, not predicted."""
    return "" if chance == 1 else "<1%" if chance < 0.01 else f"{chance:.0%}"
