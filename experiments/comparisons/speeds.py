"""The figures of the decoding speed of a machine, and their page (`spec-envs bench decoding`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from spec_envs.experiments.comparisons.floor import Floor
from spec_envs.experiments.comparisons.quality import PlainText, Quality
from spec_envs.experiments.measure.costs import Curves
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.results import AGAIN, Interval, Results, Row
from spec_envs.experiments.reports.figures import draw_arms, drawn
from spec_envs.experiments.reports.pages import definitions, table
from spec_envs.experiments.reports.report import markdown

RATIOS = {
    "plain_over_transformers": ("plain", "transformers generate"),
    "plain_over_llamacpp": ("plain", "llama.cpp"),
    "static_over_plain": ("static", "plain"),
    "static_over_llamacpp": ("static", "llama.cpp"),
    "static_over_assisted": ("static", "transformers assisted"),
    "assisted_over_transformers": ("transformers assisted", "transformers generate"),
    "static_over_llamacpp_drafting": ("static", "llama.cpp drafting"),
    "llamacpp_drafting_over_llamacpp": ("llama.cpp drafting", "llama.cpp"),
    "plain_over_xllamacpp": ("plain", "xllamacpp"),
    "plain_over_openvino": ("plain", "openvino"),
    "chain_over_plain": ("chain", "plain"),
}
OWN_ARMS = {
    "chain": "the best static chain, which the target's default draft model for chains drafts; chosen on training prompts.",
    "xllamacpp": "llama.cpp in a newer build, as the package `xllamacpp` has it, on the same file of weights.",
    "openvino": "OpenVINO GenAI with its own settings, on the same file of weights.",
}


@dataclass(kw_only=True)
class Beside(Results):
    """The table of all arms.

    Attributes:
        ratios: ratios of throughput, by the names of ``RATIOS``.
        own_argmax_share: by arm, share of the emitted tokens that are the argmax of float32's forward over the same
            text; empty if float32 is not among the dtypes or the texts are sampled.
    """

    ratios: dict[str, Interval]
    own_argmax_share: dict[str, float]


@dataclass(kw_only=True)
class Figures:
    """The figures in which machines are compared.

    Attributes:
        verify_ratio: seconds of a verification over those of a plain step, by rows, behind 256 tokens.
        context_ratio: seconds of a plain step behind 4,096 tokens over those behind 256; None for shorter contexts.
        share_of_floor: share of a plain step that reading the weights takes; None without the kernels.
    """

    processor: str
    verify_ratio: dict[int, float]
    static_over_plain: float
    context_ratio: float | None = None
    plain_over_llamacpp: float | None = None
    chain_over_plain: float | None = None
    share_of_floor: float | None = None


@dataclass(kw_only=True)
class Speeds:
    """The decoding speed of a machine.

    Attributes:
        floor: None unless the CPU kernels of this project compute.
        overhead_share: share of a step that is spent outside drafter and target.
        verify_curve: duration of the target's forwards by rows, in units of a plain step.
        expand_ratio: duration of an expansion (a level of a tree, or a token of a chain), in units of a plain step.
        quality: quality by dtype; empty if float32 is not among the dtypes.
        dtypes: plain decoding by dtype; empty as well in that case.
        dtype: dtype of the target.
    """

    target: str
    drafter: str
    table: Annotated[Beside, Inline()]
    figures: Annotated[Figures, Inline()]
    floor: Floor | None
    emitted_per_cycle: float
    overhead_share: float
    verify_curve: dict[int, float]
    expand_ratio: float
    curves_by_dtype: dict[str, Curves]
    quality: dict[str, Quality]
    dtypes: dict[str, PlainText]
    dtype: str


def draw(speeds: Speeds, path: Path) -> None:
    """Draw the arms' throughput over plain decoding, and the cost curves of every dtype."""
    with drawn(path, 9, 9) as figure:
        top, bottom = figure.subplots(2, 1)
        draw_arms(top, speeds.table.arms, "plain")
        for dtype, curves in speeds.curves_by_dtype.items():
            verify, draft = ([1000 * s for s in curves[part].values()] for part in ("verify", "draft"))
            line = bottom.plot(list(curves["verify"]), verify, marker="o", label=f"target, {dtype}")
            color = line[0].get_color()
            bottom.plot(list(curves["draft"]), draft, "x:", color=color, label=f"drafter, {dtype}")
        if speeds.floor:
            label = f"reading the {speeds.dtype} weights"
            bottom.axhline(1000 * speeds.floor.floor_seconds, color="black", linestyle=":", label=label)
        bottom.set_xlabel("rows of the forward")
        bottom.set_ylabel("milliseconds")
        bottom.set_yscale("log")
        bottom.legend(fontsize=8)


def body(speeds: Speeds) -> Iterable[str]:
    """Yield the lines of the page below its picture."""
    yield markdown(speeds.table)
    yield "## Ratios"
    yield ""
    ratios = [(name, *RATIOS[name], f"{ratio:.2f}") for name, ratio in speeds.table.ratios.items()]
    yield from table(["name", "arm", "over", "ratio [95 %]"], ratios)
    yield ""
    yield from in_figures(speeds.figures)
    yield "## Cost of a forward"
    yield ""
    yield (
        "Milliseconds of one forward by its number of rows (tokens), for each dtype: the target verifies that many "
        "tokens, the drafter drafts for that many."
    )
    yield ""
    yield from costs(speeds.curves_by_dtype)
    yield ""
    yield from notes(speeds)
    if speeds.quality:
        yield ""
        yield from by_dtype(speeds)
    yield ""
    yield from definitions(speeds.table.arms, OWN_ARMS)


def in_figures(figures: Figures) -> Iterable[str]:
    """Yield the section with the figures in which machines are compared."""
    yield "## This machine in figures"
    yield ""
    rows = [("processor", figures.processor, "of all figures of this page")]
    rows += [
        (f"verify_ratio, {n}", f"{ratio:.2f}", f"seconds of a verification of {n} rows over those of a plain step")
        for n, ratio in figures.verify_ratio.items()
    ]
    further = {
        "context_ratio": (figures.context_ratio, "seconds of a plain step behind 4,096 tokens over those behind 256"),
        "share_of_floor": (figures.share_of_floor, "share of a plain step that reading the weights takes"),
        "plain_over_llamacpp": (figures.plain_over_llamacpp, "speed of plain decoding over that of llama.cpp"),
        "static_over_plain": (figures.static_over_plain, "speed of the best static setting over plain decoding"),
        "chain_over_plain": (figures.chain_over_plain, "speed of the best static chain over plain decoding"),
    }
    rows += [(name, f"{value:.2f}", words) for name, (value, words) in further.items() if value is not None]
    yield from table(["figure", "value", "what it is"], rows)
    yield ""


def by_dtype(speeds: Speeds) -> Iterable[str]:
    """Yield the sections about the dtypes and about the fidelity of every arm's text."""
    yield "## Quality of the dtypes"
    yield ""
    yield (
        "On the prompts: the perplexity, the share of positions at which the most probable token is float32's, and how "
        "far the distributions are from float32's."
    )
    yield ""
    yield from table(
        ["dtype", "perplexity", "argmaxes that are float32's", "divergence from float32 (nats per token)"],
        [
            (dtype, f"{q.perplexity:.3f}", f"{100 * q.agreement:.1f} %", f"{q.kl:.6f}")
            for dtype, q in speeds.quality.items()
        ],
    )
    if not speeds.dtypes:
        return
    yield ""
    yield (
        "On the texts of plain decoding, all dtypes side by side: the speed, the share of emitted tokens that are "
        "float32's own choice after the text before them, and the share of whole texts that are float32's."
    )
    yield ""
    yield from table(
        ["dtype", "tokens/s", "tokens that float32 would choose", "texts that are float32's"],
        [
            (dtype, f"{f.plain_tokens_per_s:.1f}", f"{100 * f.own_argmax_share:.2f} %", f"{100 * f.same_text:.1f} %")
            for dtype, f in speeds.dtypes.items()
        ],
    )
    if not speeds.table.own_argmax_share:
        return
    yield ""
    yield "## Fidelity of the texts"
    yield ""
    yield (
        "Every engine emits its own text. The share of its tokens that are the choice of the same weights in float32, "
        "each after the text before it, beside the time of a token:"
    )
    yield ""
    arms = speeds.table.arms
    yield from table(
        ["arm", "milliseconds per token", "tokens that float32 would choose"],
        [
            (name, f"{1000 / arms[name].tokens_per_second:.2f}", f"{100 * share:.2f} %")
            for name, share in speeds.table.own_argmax_share.items()
            if not name.endswith(AGAIN)
        ],
    )


def costs(by_dtype: dict[str, Curves]) -> list[str]:
    """Return the lines of a table of the cost curves of every dtype."""
    parts = {"verify": "target", "draft": "drafter"}
    columns = {f"{parts[part]}, {dtype}": curves[part] for dtype, curves in by_dtype.items() for part in parts}
    rows = sorted({n for curve in columns.values() for n in curve})
    cells = [[f"{1000 * curve[n]:.2f}" if n in curve else "–" for curve in columns.values()] for n in rows]
    return table(["rows", *columns], [[str(n), *row] for n, row in zip(rows, cells, strict=True)])


def bounds(name: str, row: Row) -> str:
    """Return what an arm's cycles are made of."""
    draft, verify = (row.parts[part] / row.seconds for part in ("draft", "verify"))
    return (
        f"- `{name}` emits {row.emitted_per_cycle:.3f} tokens per cycle. Of its seconds {100 * draft:.1f} % are drafting, "
        f"{100 * verify:.1f} % verifying, and {100 * (1 - draft - verify):.1f} % are spent outside drafter and target."
    )


def notes(speeds: Speeds) -> list[str]:
    """Return what the cycles of the own arms are made of, and what bounds a plain step."""
    found = [
        f"- Target `{speeds.target}`, drafter `{speeds.drafter}`.",
        *(bounds(name, row) for name, row in speeds.table.arms.items() if name in ("plain", "static", "chain")),
        f"- An expansion (a level of a tree, or a token of a chain) costs {speeds.expand_ratio:.3f} of a plain step.",
    ]
    if floor := speeds.floor:
        found.append(
            f"- Reading the {floor.weight_bytes / 1e6:.0f} MB of weights that a plain step needs takes "
            f"{1000 * floor.floor_seconds:.1f} ms ({floor.read_bytes_per_second / 1e9:.1f} GB/s), "
            f"{100 * floor.share_of_floor:.0f} % of the step."
        )
    return found
