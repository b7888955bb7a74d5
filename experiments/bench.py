"""Decoding speed of this machine in one run (`make bench`): plain decoding against transformers' generate, the best
static speculation against plain, cost curves, and the share of a step spent outside drafter and target.

Writes runs/bench.json, runs/bench.png, and runs/clock.json, a cost table for `clock=runs/clock.json`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.arms import decoded, plain_decoder, run_arms, transformers_arm
from experiments.comparison import by_task, checked, divergences, same_text, summary, throughput
from experiments.costs import cost_curves, describe
from experiments.live import decoder_for, encoded_prompts
from experiments.machine import machine
from experiments.report import draw_arms, markdown
from experiments.static import best_static, static_policy
from spec_envs.controls.depth import DepthControl
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.pair import DEFAULT_TARGET
from spec_envs.files import whole, write_json


def bench(env: dict[str, Any], count: int) -> dict[str, Any]:
    """Everything in one run."""
    decoder = decoder_for(env, DepthControl())
    static = best_static(env, decoder.tree.width, decoder.max_depth)
    return checked(lambda prompts: measure(decoder, env, static, prompts), count)


def measure(decoder: Decoder, env: dict[str, Any], static: dict[str, Any], count: int) -> dict[str, Any]:
    """The arms on held-out prompts, and the cost curves."""
    curves = cost_curves(decoder)
    plain = plain_decoder(decoder)
    arms = {
        "plain": decoded(plain, None),
        "plain again": decoded(plain, None),
        "transformers generate": transformers_arm(env["target"], decoder),
        "static": decoded(decoder, static_policy(*static["best"])),
    }
    prompts = encoded_prompts(env, "test", count)
    samples = run_arms(arms, prompts, env["max_new_tokens"], "held-out prompts")
    rows = summary(samples, ["plain", "transformers generate"])
    speculative = rows["static"]
    inside = speculative["parts"]["draft"] + speculative["parts"]["verify"]
    one = curves["verify"][1]
    return {
        "plain_over_transformers": rows["plain"]["over_transformers generate"],
        "static_over_plain": speculative["over_plain"],
        "emitted_per_cycle": speculative["emitted_per_cycle"],
        "overhead_share": 1 - inside / speculative["seconds"],
        "verify_curve": {n: s / one for n, s in curves["verify"].items()},
        "expand_ratio": curves["draft"][decoder.tree.width] / one,
        "arms": rows,
        "references": ["plain", "transformers generate"],
        "static": static,
        "prompts": len(samples["plain"]),
        "tasks": list(by_task(samples["plain"])),
        "max_new_tokens": env["max_new_tokens"],
        "temperature": decoder.verifier.temperature,
        "machine": machine(decoder),
        "curves": describe(curves),
        "seconds": curves,
        "divergences": {
            "static": divergences(decoder, samples["static"])
            | {"same_text": same_text(samples["static"], samples["plain"])}
        }
        if decoder.verifier.temperature == 0
        else {},
        "by_task": {
            name: {task: throughput(group) for task, group in by_task(arm).items()} for name, arm in samples.items()
        },
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
    try:
        results = bench(env, args.count)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
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
