"""A picture that is drawn in pixels from its upper left corner, in colours that colour-blind people tell apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import FancyBboxPatch

WIDTH, HEIGHT, MARGIN = 800, 480, 16  # the margin is that on both sides
DPI = 100
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"  # matplotlib ships both
ADVANCE = 0.602  # width of a letter of MONO, in units of the font's size
# Blue, green and vermilion are those of Okabe and Ito, darker where they are written on white.
BLUE, GREEN, RED = "#0072b2", "#007a5a", "#b84a00"
DARK, GREY, PALE, PAPER, WHITE = "#1c2430", "#667080", "#c3cad2", "#f4f6f8", "#ffffff"


class Canvas:
    """A picture of ``HEIGHT`` by ``WIDTH`` pixels, on which everything is drawn over what was drawn before."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axes.set_axis_off()
        self._drawn = 0

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        colour: str = DARK,
        *,
        bold: bool = False,
        mono: bool = False,
        align: str = "left",
    ) -> None:
        """Write a line, centred on ``y``.

        Args:
            size: of the font, in pixels.
            align: where ``x`` is in the line: ``"left"``, ``"center"`` or ``"right"``.
        """
        font = FontProperties(family=MONO if mono else SANS, weight="bold" if bold else "normal", size=size * 72 / DPI)
        line = self.axes.text(x, y, drawable(text), color=colour, fontproperties=font, zorder=self._above())
        line.set(horizontalalignment=align, verticalalignment="center_baseline", parse_math=False)

    def box(
        self, x: float, y: float, width: float, height: float, face: str, edge: str, *, dashed: bool = False
    ) -> None:
        """Draw a box with round corners; ``x`` and ``y`` are its upper left one."""
        box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=4", zorder=self._above())
        box.set(facecolor=face, edgecolor=edge, linestyle=(0, (3, 2)) if dashed else "solid", linewidth=1)
        self.axes.add_patch(box)

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, width: float = 1.0) -> None:
        """Draw a line through points."""
        self.axes.plot(xs, ys, color=colour, linewidth=width, zorder=self._above())

    def pixels(self) -> np.ndarray:
        """Return the picture ``[HEIGHT, WIDTH, 3]``, uint8."""
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def _above(self) -> int:
        """Return the order of what is drawn next: after everything else."""
        self._drawn += 1
        return self._drawn


def drawable(text: str) -> str:
    """Return a text whose characters all have a glyph in the fonts; others become boxes."""
    return "".join(letter if ord(letter) in glyphs() else "□" for letter in text)


@functools.cache
def glyphs() -> frozenset[int]:
    """Return the characters for which both fonts have a glyph."""
    return frozenset.intersection(*(frozenset(get_font(findfont(family)).get_charmap()) for family in (SANS, MONO)))


def cut(text: str, letters: int) -> str:
    """Return a text of at most that many letters, with an ellipsis where it was cut."""
    return text if len(text) <= letters else text[: max(letters - 1, 0)] + "…"


def tinted(colour: str, strength: float) -> str:
    """Return a colour mixed with white: white at strength 0, itself at 1."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - strength * (255 - part)):02x}" for part in parts)
