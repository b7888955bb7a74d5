"""Show a decoder's text, the cycle under way or the last one, and the text's totals as a picture."""

from __future__ import annotations

from collections.abc import Iterator

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
        (draw_chain if engine.tree.width == 1 else draw_tree)(canvas, engine, view, root)
    elif last and last.drafted:
        canvas.text(
            WIDTH / 2, 260, "This engine reports counts of what it drafted, not the tokens.", 13, GREY, align="center"
        )
    caption = words.happened(last, engine.tree.width) if last else words.drafting(engine.tree)
    canvas.text(MARGIN, 413, caption, 14, bold=True)
    canvas.text(WIDTH - MARGIN, 413, words.sent(last) if last else "", 11, GREY, align="right")
    canvas.text(MARGIN, 436, words.totals(engine.cycles, plain_rate), 12)
    draw_legend(canvas, 463)
    return canvas.pixels()


def draw_text(canvas: Canvas, engine: Engine, last: Cycle | None) -> None:
    """Write the last lines of the text: drafted tokens green, the target's own black and bold, those of the last cycle
    on yellow."""
    canvas.box(MARGIN - 6, 28, WIDTH - 2 * MARGIN + 12, LINES * LINE + 12, PAPER, PALE)
    lines: list[list[tuple[int, str, str, bool]]] = [[]]  # of each: column, text, colour, whether it is new
    column = 0
    for text, colour, new in pieces(engine, last):
        for part in text.expandtabs(4).splitlines(keepends=True):
            rest = part.removesuffix("\n")
            while rest:
                if column == COLUMNS:
                    lines.append([])
                    column = 0
                lines[-1].append((column, rest[: COLUMNS - column], colour, new))
                column, rest = column + len(lines[-1][-1][1]), rest[COLUMNS - column :]
            if part.endswith("\n"):
                lines.append([])
                column = 0
    for row, line in enumerate(lines[-LINES:]):
        y = 28 + 6 + LINE * (row + 0.5)
        for column, text, _, new in line:
            x = MARGIN + 4 + column * SIZE * ADVANCE
            if new:
                canvas.box(x - 1, y - 8, len(text) * SIZE * ADVANCE + 2, 16, NEW, NEW)
        for column, text, colour, _ in line:
            x = MARGIN + 4 + column * SIZE * ADVANCE
            canvas.text(x, y, text, SIZE, colour, bold=colour == DARK, mono=True)


def pieces(engine: Engine, last: Cycle | None) -> Iterator[tuple[str, str, bool]]:
    """Yield the text in pieces, each with its colour and whether the last cycle emitted it."""
    stream = TextStream(engine.detokenize)
    colour, new = DARK, False
    yield printable(stream.push(engine.tokens[:1])), colour, new
    for cycle in engine.cycles:
        new = cycle is last
        colour = BLUE if cycle.unverified else GREEN
        cut_at = cycle.emitted if cycle.unverified else cycle.accepted
        yield printable(stream.push(cycle.tokens[:cut_at])), colour, new
        if cut_at < cycle.emitted:
            colour = DARK
            yield printable(stream.push(cycle.tokens[cut_at:])), colour, new
    yield printable(stream.finish()), colour, new
