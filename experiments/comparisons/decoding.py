"""Decoding speed of this machine in one run (`make bench`): plain decoding and the best static speculation against
transformers and llama.cpp on the same weights, cost curves by dtype, how near a forward is to the time that reading
its weights takes, what each dtype costs in quality, and the share of a step spent outside drafter and target.

Writes runs/bench.json, runs/bench.png, and runs/clock.json, a cost table for `clock=runs/clock.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spec_envs.arguments import PROMPTS, TEMPERATURE, TOKENS, Parser, nonempty, output_folder
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.decoding.loading import DEFAULT_TARGET, drafts_chains, without_lookup
from spec_envs.decoding.model import kernels
from spec_envs.decoding.weights.checkpoints import DTYPES
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.evaluate import run_tables
from spec_envs.experiments.measure.costs import curves_by_dtype, dtypes_at_speed, read_seconds, weight_bytes
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts, target_and_drafter
from spec_envs.experiments.measure.quality import quality
from spec_envs.experiments.measure.references import assisted_arms, llamacpp_arms
from spec_envs.experiments.measure.report import draw_arms, markdown
from spec_envs.experiments.measure.static import best_static, static_policy
from spec_envs.experiments.measure.statistics import with_aa_check
from spec_envs.files import whole, write_json

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


def bench(env: dict[str, Any], count: int, compared: Sequence[str] | None) -> dict[str, Any]:
    """Everything in one run."""
    target_name, drafter = target_and_drafter(env)
    drafter = without_lookup(drafter)  # none of the others looks up first
    env = {**env, "drafter": drafter}
    chain = drafts_chains(drafter)
    control = KControl() if chain else DepthControl()
    decoder = decoder_for(env, control)
    target, device = decoder.local.target, decoder.verifier.device
    static = best_static(env, control)
    policies = {"static": static_policy(control, static["best"])}
    draft = (drafter, max(1, static["best"][0])) if chain else None
    others = assisted_arms(target_name, decoder, draft)
    if not decoder.verifier.temperature and device.type == "cpu":
        others |= llamacpp_arms(target_name, torch.get_num_threads(), draft)
    references = ["plain", *others]

    def measure(prompts: int) -> dict[str, Any]:
        return run_tables(policies, env, decoder, prompts, references, ["static"], others) | {"static": static}

    results = with_aa_check(measure, count)
    arms, verify = results["arms"], results["seconds"]["verify"]
    speculative = arms["static"]
    inside = speculative["parts"]["draft"] + speculative["parts"]["verify"]
    curves = curves_by_dtype(env, control, compared or dtypes_at_speed(device))
    texts = [prompt.ids for prompt in encoded_prompts(env, "test", count)]
    return {
        **{name: arms[a][f"over_{b}"] for name, (a, b) in RATIOS.items() if a in arms and b in arms},
        **(share_of_floor(weight_bytes(decoder), verify[1]) if kernels.library() and device.type == "cpu" else {}),
        "emitted_per_cycle": speculative["emitted_per_cycle"],
        "overhead_share": 1 - inside / speculative["seconds"],
        "verify_curve": {n: s / verify[1] for n, s in verify.items()},
        "expand_ratio": results["seconds"]["draft"][decoder.tree.width] / verify[1],
        "curves_by_dtype": curves,
        "quality": quality(target_name, device, list(curves), texts) if "float32" in curves else {},
        "dtype": str(target.dtype).removeprefix("torch."),
        **results,
    }


def share_of_floor(size: int, seconds: float) -> dict[str, float]:
    """How much of a plain step is the time that its weights take to be read."""
    floor = read_seconds(size)
    return {
        "weight_bytes": size,
        "read_bytes_per_second": size / floor,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Arms over plain, and the cost curves of every dtype."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1)
    draw_arms(top, results["arms"], "plain")
    for dtype, curves in results["curves_by_dtype"].items():
        line = bottom.plot(
            list(curves["verify"]), [1000 * s for s in curves["verify"].values()], marker="o", label=f"target, {dtype}"
        )
        draft, color = [1000 * s for s in curves["draft"].values()], line[0].get_color()
        bottom.plot(list(curves["draft"]), draft, "x:", color=color, label=f"drafter, {dtype}")
    if "floor_seconds" in results:
        label = f"reading the {results['dtype']} weights"
        bottom.axhline(1000 * results["floor_seconds"], color="black", linestyle=":", label=label)
    bottom.set_xlabel("rows of the forward")
    bottom.set_ylabel("milliseconds")
    bottom.set_yscale("log")
    bottom.legend(fontsize=8)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def lines(results: dict[str, Any]) -> list[str]:
    """The figures below the table."""
    found = [
        f"{name}: {r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
        for name, r in ((name, results[name]) for name in RATIOS if name in results)
    ]
    names = ("share_of_floor", "emitted_per_cycle", "overhead_share", "expand_ratio")
    found += [f"{name}: {results[name]:.3f}" for name in names if name in results]
    if "floor_seconds" in results:
        found.append(
            f"reading {results['weight_bytes'] / 1e6:.0f} MB of weights: {1000 * results['floor_seconds']:.1f} ms "
            f"({results['read_bytes_per_second'] / 1e9:.1f} GB/s)"
        )
    for dtype, curves in results["curves_by_dtype"].items():
        target = ", ".join(f"{n}: {1000 * s:.1f}" for n, s in curves["verify"].items())
        draft = ", ".join(f"{n}: {1000 * s:.2f}" for n, s in curves["draft"].items())
        found.append(f"{dtype}: target ms by rows {target}; drafter {draft}")
    found += [
        f"{dtype}: perplexity {q['perplexity']:.3f}, {100 * q['agreement']:.1f} % of argmaxes are float32's, "
        f"divergence {q['kl']:.5f} nats"
        for dtype, q in results["quality"].items()
    ]
    return found


def dtypes(names: str) -> list[str]:
    """Dtypes separated by commas."""
    found = [name.strip() for name in names.split(",")]
    if unknown := set(found) - set(DTYPES):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))} is unknown; expected some of {', '.join(DTYPES)}"
        )
    return found


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--target", type=nonempty, default=DEFAULT_TARGET, help=f"model (default {DEFAULT_TARGET})")
    parser.add_argument(
        "--drafter", type=nonempty, default="auto", help="EAGLE-3 head or draft model (default: the target's own)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto, int8, bfloat16, float16, float32")
    parser.add_argument(
        "--dtypes",
        type=dtypes,
        help="whose cost curves are compared, separated by commas, and with float32 among them their quality (default: "
        "all that compute at speed here, and float32)",
    )
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0)
    parser.add_argument("--count", type=PROMPTS, default=15, help="held-out prompts (default 15)")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=96)
    parser.add_argument("--out", type=output_folder, default=Path("runs"), help="folder of the results (default runs)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    env = {
        "target": args.target,
        "drafter": args.drafter,
        "device": args.device,
        "dtype": args.dtype,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
    }
    with one_sentence():
        results = bench(env, args.count, args.dtypes)
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "bench.json", results)
        write_json(args.out / "clock.json", results["seconds"])
        draw(results, args.out / "bench.png")
        print("\n".join([markdown(results), *lines(results)]))
        print(f"written: {args.out}/bench.json, bench.png, clock.json")


if __name__ == "__main__":
    main()
