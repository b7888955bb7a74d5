"""Decoding speed of this machine in one run (`make bench`): plain decoding against transformers' generate, the best
static speculation against plain, cost curves, and the share of a step spent outside drafter and target.

Writes runs/bench.json, runs/bench.png, and runs/clock.json, a cost table for `clock=runs/clock.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.command import one_sentence
from experiments.comparison import with_aa_check
from experiments.evaluate import run_tables
from experiments.live import decoder_for
from experiments.report import draw_arms, markdown
from experiments.static import best_static, static_policy
from spec_envs.controls.depth import DepthControl
from spec_envs.decoding.pair import DEFAULT_TARGET
from spec_envs.files import whole, write_json


def bench(env: dict[str, Any], count: int) -> dict[str, Any]:
    """Everything in one run."""
    decoder = decoder_for(env, DepthControl())
    static = best_static(env, decoder.tree.width, decoder.max_depth)
    policies = {"static": static_policy(*static["best"])}
    references = ["plain", "transformers generate"]

    def measure(prompts: int) -> dict[str, Any]:
        return run_tables(policies, env, decoder, prompts, references, ["static"]) | {"static": static}

    results = with_aa_check(measure, count)
    speculative, verify = results["arms"]["static"], results["seconds"]["verify"]
    inside = speculative["parts"]["draft"] + speculative["parts"]["verify"]
    return {
        "plain_over_transformers": results["arms"]["plain"]["over_transformers generate"],
        "static_over_plain": speculative["over_plain"],
        "emitted_per_cycle": speculative["emitted_per_cycle"],
        "overhead_share": 1 - inside / speculative["seconds"],
        "verify_curve": {n: s / verify[1] for n, s in verify.items()},
        "expand_ratio": results["seconds"]["draft"][decoder.tree.width] / verify[1],
        **results,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """Arms over plain, and the cost curves."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1)
    draw_arms(top, results["arms"], "plain")
    curve = results["verify_curve"]
    bottom.plot(list(curve), list(curve.values()), marker="o", label="T_verify(n) / T_verify(1)")
    bottom.axhline(results["expand_ratio"], color="tab:orange", label="T_expand / T_verify(1)")
    bottom.set_xlabel("rows of the forward")
    bottom.set_ylim(bottom=0)
    bottom.legend()
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=DEFAULT_TARGET, help=f"model (default {DEFAULT_TARGET})")
    parser.add_argument("--drafter", default="auto", help="EAGLE-3 head (default: the shipped one)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--count", type=int, default=15, help="held-out prompts (default 15)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results (default runs)")
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
        results = bench(env, args.count)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "bench.json", results)
    write_json(args.out / "clock.json", results["seconds"])
    draw(results, args.out / "bench.png")
    print(markdown(results))
    for key in ("plain_over_transformers", "static_over_plain"):
        r = results[key]
        print(f"{key}: {r['value']:.2f} [{r['low']:.2f}, {r['high']:.2f}]")
    for key in ("emitted_per_cycle", "overhead_share", "expand_ratio"):
        print(f"{key}: {results[key]:.3f}")
    print(f"written: {args.out}/bench.json, bench.png, clock.json")


if __name__ == "__main__":
    main()
