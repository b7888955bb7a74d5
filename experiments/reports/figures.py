"""Pictures of results: opening and writing a figure, and drawings that several pictures share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spec_envs.experiments.measure.results import Compared, Histogram, Interval
from spec_envs.files import whole

CROWDED = 24  # number of settings above which their names are written vertically
LETTERS = 90  # likewise, in all of their names


@contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure to draw in, with its size in inches, and write it as a PNG file when the block ends."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    write_png(figure, path)


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_arms(
    axis: Axes, arms: Mapping[str, Compared], reference: str, priced: Mapping[str, Compared] | None = None
) -> None:
    """Draw horizontal bars of the arms' throughput over that of a reference arm, and below each the priced one."""
    names = list(arms)[::-1]
    groups = {"timed": arms, "priced": priced} if priced else {"": arms}
    for i, (label, rows) in enumerate(groups.items()):
        height = 0.8 / len(groups)
        places = {n: y + 0.4 - height * (i + 0.5) for y, n in enumerate(names) if n in rows}
        ratios = [rows[name].over[reference] for name in places]
        values = [ratio.value for ratio in ratios]
        errors = error_bars(ratios)
        axis.barh(list(places.values()), values, height, xerr=errors, color=f"C{i}", alpha=0.75, capsize=3, label=label)
        for y, ratio in zip(places.values(), ratios, strict=True):
            axis.annotate(
                f"{ratio.value:.2f}×", (ratio.high, y), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
    axis.set_yticks(range(len(names)), names)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.margins(x=0.1)
    axis.set_xlabel(f"throughput over {reference}, 95 % interval")
    if priced:
        axis.legend(fontsize=8)


def draw_ratios(axis: Axes, ratios: Mapping[str, Interval]) -> None:
    """Draw horizontal bars with their intervals, the first bar at the bottom."""
    errors = error_bars(list(ratios.values()))
    values = [ratio.value for ratio in ratios.values()]
    axis.barh(list(ratios), values, xerr=errors, color="tab:blue", alpha=0.75, capsize=3)


def error_bars(ratios: Sequence[Interval]) -> list[list[float]]:
    """Return the lengths of error bars below and above ratios.

    A length is at least 0: if rounding decides, a ratio may lie just outside its interval, which comes from a
    bootstrap.
    """
    return [[max(0.0, r.value - r.low) for r in ratios], [max(0.0, r.high - r.value) for r in ratios]]


def draw_shares(axis: Axes, histogram: Histogram) -> None:
    """Draw the share of each choice in each state of a link: one bar per state, rare choices together."""
    total = sum((Counter(counts) for counts in histogram.values()), Counter[str]())
    common = [choice for choice, n in total.most_common(9) if n >= 0.01 * total.total()]
    bottom = [0.0] * len(histogram)
    for choice in [*common, None]:
        shares = []
        for counts in histogram.values():
            n = sum(v for c, v in counts.items() if c == choice or (choice is None and c not in common))
            shares.append(n / max(1, sum(counts.values())))
        if any(shares):
            axis.bar(range(len(histogram)), shares, 0.8, bottom, label=choice or "others")
            bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
    few = len(histogram) <= 12
    axis.set_xticks(range(len(histogram)) if few else [], list(histogram) if few else [], fontsize=8)
    axis.set_xlabel("state of the link: rate up, round trip")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_histogram(axis: Axes, histogram: Histogram) -> None:
    """Draw the share of cycles of each setting, one bar per task."""
    width = 0.8 / len(histogram)
    for i, (task, counts) in enumerate(histogram.items()):
        total = max(1, sum(counts.values()))
        at = [x + (i - (len(histogram) - 1) / 2) * width for x in range(len(counts))]
        axis.bar(at, [n / total for n in counts.values()], width, label=task)
        crowded = len(counts) > CROWDED or sum(map(len, counts)) > LETTERS
        axis.set_xticks(range(len(counts)), list(counts), rotation=90 if crowded else 0)
    axis.set_ylabel("share of cycles")
    axis.legend(fontsize=8)
