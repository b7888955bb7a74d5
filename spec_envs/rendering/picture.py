"""Show a decoder's text, the cycle under way or the last one, and the text's totals as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.engine import Engine
from spec_envs.rendering import words
from spec_envs.rendering.canvas import ADVANCE, BLUE, DARK, GREEN, GREY, MARGIN, PALE, PAPER, WIDTH, Canvas, cut, tinted
from spec_envs.rendering.chains import draw_chain
from spec_envs.rendering.pills import draw_legend
from spec_envs.rendering.trees import draw_tree
from spec_envs.rendering.view import ended, under_way
from spec_envs.text import TextStream, printable

SIZE, LINE, LINES = 13, 17, 4  # of the text: size of letters and of lines in pixels, most lines
COLUMNS = int((WIDTH - 2 * MARGIN - 16) / (SIZE * ADVANCE))
NEW = tinted("#f0e442", 0.45)  # behind the tokens of the last cycle


class Ink(NamedTuple):
    """How a letter is written: its colour, and whether the last cycle emitted it."""

    colour: str
    new: bool


class Letter(NamedTuple):
    """A letter of the text."""

    text: str
    ink: Ink


def picture(engine: Engine, title: str, last: Cycle | None, plain_rate: float) -> np.ndarray:
    """Return a picture ``[480, 800, 3]``, uint8.

    Args:
        engine: what decodes; ``keep_trees`` has been called for it.
        title: what is answered.
        last: the cycle that has just ended and is shown; None shows the cycle under way.
        plain_rate: tokens per second of plain decoding.
    """
    canvas = Canvas()
    canvas.text(MARGIN, 16, cut(" ".join(printable(title).split()), 115), 12, GREY)
    draw_text(canvas, engine, last)
    view = ended(engine, last) if last else under_way(engine)
    root = engine.tokens[-1 - last.emitted if last else -1]
    if len(view.tokens) or (last and not last.drafted and last.emitted == 1):
        is_chain = view.is_chain or not len(view.tokens)
        (draw_chain if is_chain else draw_tree)(canvas, engine, view, root)
    elif last and last.drafted:
        canvas.text(
            WIDTH / 2, 260, "This engine reports counts of what it drafted, not the tokens.", 13, GREY, align="center"
        )
    caption = words.happened(last, engine.tree.width) if last else words.drafting(engine.tree)
    canvas.text(MARGIN, 413, caption, 14, bold=True)
    canvas.text(WIDTH - MARGIN, 413, words.sent(last) if last else "", 11, GREY, align="right")
    canvas.text(MARGIN, 436, words.totals(engine.cycles, plain_rate), 12)
    canvas.text(WIDTH - MARGIN, 436, cut(words.by(last), 31) if last else "", 10, align="right")
    draw_legend(canvas, 463)
    return canvas.pixels()


def draw_text(canvas: Canvas, engine: Engine, last: Cycle | None) -> None:
    """Write the last lines of the text: drafted tokens green, the target's own black and bold, those of the last cycle
    on yellow."""
    canvas.box(MARGIN - 6, 28, WIDTH - 2 * MARGIN + 12, LINES * LINE + 12, PAPER, PALE)
    runs = []
    for row, line in enumerate(wrapped(pieces(engine, last))[-LINES:]):
        y, x = 34 + LINE * (row + 0.5), MARGIN + 4.0
        for ink, letters in itertools.groupby(line, key=lambda letter: letter.ink):
            runs.append((x, y, "".join(letter.text for letter in letters), ink))
            x += len(runs[-1][2]) * SIZE * ADVANCE
    for x, y, text, ink in runs:
        if ink.new:
            canvas.box(x, y - 8, len(text) * SIZE * ADVANCE, 16, NEW, NEW)
    for x, y, text, ink in runs:
        canvas.text(x, y, text, SIZE, ink.colour, bold=ink.colour == DARK, mono=True)


def wrapped(pieces: Iterable[tuple[str, Ink]]) -> list[list[Letter]]:
    """Return a text in lines of at most ``COLUMNS`` letters, broken at spaces where there are any."""
    lines: list[list[Letter]] = [[]]
    for text, ink in pieces:
        for letter in text.expandtabs(4):
            if letter == "\n":
                lines.append([])
                continue
            if len(lines[-1]) == COLUMNS:
                spaces = [i for i, before in enumerate(lines[-1]) if before.text == " "]
                end = COLUMNS if letter == " " or not spaces else spaces[-1] + 1
                lines[-1:] = [lines[-1][:end], lines[-1][end:]]
            lines[-1].append(Letter(letter, ink))
    return lines


def pieces(engine: Engine, last: Cycle | None) -> Iterator[tuple[str, Ink]]:
    """Yield the text in pieces."""
    stream = TextStream(engine.detokenize)
    ink = Ink(DARK, False)
    yield printable(stream.push(engine.tokens[:1])), ink
    for cycle in engine.cycles:
        drafted = cycle.accepted + cycle.unverified
        ink = Ink(BLUE if cycle.unverified else GREEN, cycle is last)
        yield printable(stream.push(cycle.tokens[:drafted])), ink
        if drafted < cycle.emitted:
            ink = Ink(DARK, cycle is last)
            yield printable(stream.push(cycle.tokens[drafted:])), ink
    yield printable(stream.finish()), ink
