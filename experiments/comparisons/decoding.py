"""Measure the decoding speed of this machine in one run (`spec-envs bench decoding`).

Plain decoding and the best static speculation are compared with transformers and llama.cpp on the same weights. The
page also has cost curves by dtype, the share of a forward that reading its weights takes, the quality of each dtype,
and the share of a step that is spent outside drafter and target. Writes decoding.json, decoding.md and decoding.png
into --out, and a cost table of this machine for `clock=runs/clock.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from spec_envs.arguments import PROMPTS, TEMPERATURE, TOKENS, Parser, add_model_arguments, output_file
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.decoding.decoder import over_models
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.model import kernels
from spec_envs.decoding.weights.checkpoints import DTYPES
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.comparisons.floor import Floor, weight_bytes
from spec_envs.experiments.comparisons.quality import Quality, quality
from spec_envs.experiments.measure.costs import (
    Curves,
    curves_by_dtype,
    dtypes_at_speed,
)
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.figures import draw_arms, drawn
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts, target_and_drafter
from spec_envs.experiments.measure.pages import Page, add_page_arguments, definitions, table
from spec_envs.experiments.measure.references import assisted_arms, llamacpp_arms
from spec_envs.experiments.measure.report import markdown
from spec_envs.experiments.measure.results import Interval, Results
from spec_envs.experiments.measure.static import best_static, static_policy
from spec_envs.experiments.measure.statistics import with_aa_check
from spec_envs.experiments.measure.tables import run_tables
from spec_envs.files import write_json
from spec_envs.settings import Keywords

KEYWORDS = ("target", "drafter", "device", "dtype", "temperature", "max_new_tokens")  # of the environment, as options
RATIOS = {
    "plain_over_transformers": ("plain", "transformers generate"),
    "plain_over_llamacpp": ("plain", "llama.cpp"),
    "static_over_plain": ("static", "plain"),
    "static_over_llamacpp": ("static", "llama.cpp"),
    "static_over_assisted": ("static", "transformers assisted"),
    "assisted_over_transformers": ("transformers assisted", "transformers generate"),
    "static_over_llamacpp_drafting": ("static", "llama.cpp drafting"),
    "llamacpp_drafting_over_llamacpp": ("llama.cpp drafting", "llama.cpp"),
}


@dataclass(kw_only=True)
class Speeds:
    """The decoding speed of a machine.

    Attributes:
        ratios: ratios of throughput, by the names of ``RATIOS``.
        floor: None unless the CPU kernels of this project compute.
        overhead_share: share of a step that is spent outside drafter and target.
        verify_curve: duration of the target's forwards by rows, in units of a plain step.
        expand_ratio: duration of an expansion (a level of a tree, or a token of a chain), in units of a plain step.
        quality: quality by dtype; empty if float32 is not among the dtypes.
        dtype: dtype of the target.
    """

    target: str
    drafter: str
    table: Annotated[Results, Inline()]
    ratios: dict[str, Interval]
    floor: Floor | None
    emitted_per_cycle: float
    overhead_share: float
    verify_curve: dict[int, float]
    expand_ratio: float
    curves_by_dtype: dict[str, Curves]
    quality: dict[str, Quality]
    dtype: str


def compare_decoding(env: Keywords, count: int, compared: Sequence[str] | None) -> Speeds:
    """Measure the decoding speed of this machine.

    Args:
        env: keyword arguments of all arms (target, drafter, dtype, …).
        count: number of held-out prompts.
        compared: dtypes whose cost curves are measured; by default those that this machine computes fast.
    """
    target_name, drafter = target_and_drafter(env)
    name = DrafterName.parse(drafter)
    if name.model:
        name = DrafterName(
            lookup=False, model=name.model
        )  # without lookup, which other software does not combine with a model
    drafter = str(name)
    env = {**env, "drafter": drafter}
    control = KControl() if name.chain else DepthControl()
    decoder = over_models(decoder_for(env, control))
    target, device = decoder.local.target, decoder.verifier.device
    static = best_static(env, control)
    policies = {"static": static_policy(control, static.best)}
    draft = (drafter, max(1, int(static.best[0]))) if name.chain else None
    others = assisted_arms(target_name, decoder, draft)
    if not decoder.verifier.temperature and device.type == "cpu":
        others |= llamacpp_arms(target_name, torch.get_num_threads(), draft)
    references = ["plain", *others]

    def measure(prompts: int) -> Results:
        return replace(run_tables(policies, env, decoder, prompts, references, ["static"], others), static=static)

    table = with_aa_check(measure, count)
    curves = table.seconds
    if curves is None:
        raise ValueError("a cost table prices the forwards; expected clock=wall, because speed is measured")
    arms, verify, speculative = table.arms, curves["verify"], table.arms["static"]
    inside = speculative.parts["draft"] + speculative.parts["verify"]
    by_dtype = curves_by_dtype(env, control, compared or dtypes_at_speed(device))
    texts = [prompt.ids for prompt in encoded_prompts(env, "test", count)]
    on_kernels = kernels.library() and device.type == "cpu"
    return Speeds(
        target=target_name,
        drafter=drafter,
        table=table,
        ratios={name: arms[a].over[b] for name, (a, b) in RATIOS.items() if a in arms and b in arms},
        floor=Floor.of(weight_bytes(decoder), verify[1]) if on_kernels else None,
        emitted_per_cycle=speculative.emitted_per_cycle,
        overhead_share=1 - inside / speculative.seconds,
        verify_curve={n: s / verify[1] for n, s in verify.items()},
        expand_ratio=curves["draft"][decoder.tree.width] / verify[1],
        curves_by_dtype=by_dtype,
        quality=quality(target_name, device, list(by_dtype), texts) if "float32" in by_dtype else {},
        dtype=str(target.dtype).removeprefix("torch."),
    )


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
    ratios = [(name, *RATIOS[name], f"{ratio:.2f}") for name, ratio in speeds.ratios.items()]
    yield from table(["name", "arm", "over", "ratio [95 %]"], ratios)
    yield ""
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
        yield "## Quality of the dtypes"
        yield ""
        yield from table(
            ["dtype", "perplexity", "argmaxes that are float32's", "divergence from float32 (nats per token)"],
            [
                (dtype, f"{q.perplexity:.3f}", f"{100 * q.agreement:.1f} %", f"{q.kl:.5f}")
                for dtype, q in speeds.quality.items()
            ],
        )
    yield ""
    yield from definitions(speeds.table.arms, {})


def costs(by_dtype: dict[str, Curves]) -> list[str]:
    """Return the lines of a table of the cost curves of every dtype."""
    parts = {"verify": "target", "draft": "drafter"}
    columns = {f"{parts[part]}, {dtype}": curves[part] for dtype, curves in by_dtype.items() for part in parts}
    rows = sorted({n for curve in columns.values() for n in curve})
    cells = [[f"{1000 * curve[n]:.2f}" if n in curve else "–" for curve in columns.values()] for n in rows]
    return table(["rows", *columns], [[str(n), *row] for n, row in zip(rows, cells, strict=True)])


def notes(speeds: Speeds) -> list[str]:
    """Return what a cycle of the best static setting is made of."""
    found = [
        f"- Target `{speeds.target}`, drafter `{speeds.drafter}`.",
        f"- The best static setting emits {speeds.emitted_per_cycle:.3f} tokens per cycle.",
        f"- {100 * speeds.overhead_share:.1f} % of its seconds are spent outside drafter and target.",
        f"- An expansion (a level of a tree, or a token of a chain) costs {speeds.expand_ratio:.3f} of a plain step.",
    ]
    if floor := speeds.floor:
        found.append(
            f"- Reading the {floor.weight_bytes / 1e6:.0f} MB of weights that a plain step needs takes "
            f"{1000 * floor.floor_seconds:.1f} ms ({floor.read_bytes_per_second / 1e9:.1f} GB/s), "
            f"{100 * floor.share_of_floor:.0f} % of the step."
        )
    return found


PAGE = Page(
    kind=Speeds,
    command="bench decoding",
    title="Decoding speed",
    purpose="Plain decoding and the best static speculation are measured beside transformers and llama.cpp on the same "
    "weights, because an agent is worth something only on top of a decoder that is fast without it.",
    caption="Throughput of every arm over plain decoding, and the cost of a forward by its rows",
    body=body,
    machines=lambda speeds: [speeds.table.machine],
    draw=draw,
)


def dtypes(names: str) -> list[str]:
    """Return the dtypes that a text lists, separated by commas."""
    found = [name.strip() for name in names.split(",")]
    if unknown := set(found) - set(DTYPES):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))} is unknown; expected some of {', '.join(DTYPES)}"
        )
    return found


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, drafter="EAGLE-3 head or draft model")
    parser.add_argument(
        "--dtypes",
        type=dtypes,
        help="dtypes whose cost curves are compared, separated by commas; with float32 among them their quality, too "
        "(default: those that this machine computes fast, and float32)",
    )
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy (default 0)")
    parser.add_argument("--count", type=PROMPTS, default=15, help="number of held-out prompts (default 15)")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=96, help="most new tokens per prompt (default 96)")
    parser.add_argument(
        "--clock", type=output_file, default=Path("runs/clock.json"), help="cost table (default runs/clock.json)"
    )
    add_page_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    env = {name: vars(args)[name] for name in KEYWORDS}
    with one_sentence():
        speeds = PAGE.publish(args, lambda: compare_decoding(env, args.count, args.dtypes), "decoding")
        if not args.from_json:
            args.clock.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.clock, speeds.table.seconds)
            print(f"written: {args.clock}")


if __name__ == "__main__":
    main()
