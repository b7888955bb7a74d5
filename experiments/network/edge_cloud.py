"""Speculation between edge and cloud against the cloud alone, through a real socket (`make edge-cloud`).

Prompt by prompt, interleaved: edge-cloud drafts here and has a cloud verify; cloud-only streams the cloud's own text, and
does so twice, to show what the machine's moods amount to (A/A). Without --host and --port a cloud is started for the
measurement, on this machine, which then has the work of both sides. Writes runs/edge-cloud.json and runs/edge-cloud.png.

Seconds, bytes and tokens are means per text. Latency is that of the whole text; its parts are the prefill (the prompt's
network included), and after it the edge (drafting), the network (the cloud's computing and queueing subtracted), the
cloud, and whatever is left. The speedup is that of tokens per second of the whole text, prefill included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spec_envs.arguments import POSITIVE, TEMPERATURE, TOKENS, Parser, nonempty, output_folder, whole_number
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.loading import DEFAULT_TARGET
from spec_envs.decoding.weights.checkpoints import resolve_device, resolve_dtype
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.measure.arms import Encoded, Sample, decoded, run_arms
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.measure.machine import machine
from spec_envs.experiments.measure.report import draw_arms
from spec_envs.experiments.measure.static import static_chain
from spec_envs.experiments.measure.statistics import aa_agrees, ratio, throughput, with_aa_check
from spec_envs.experiments.network.cloud_process import behind, cloud
from spec_envs.files import whole, write_json
from spec_envs.network.cloud.engine import LONGEST_DRAFT
from spec_envs.network.edge.__main__ import address, connected
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.link import load_link
from spec_envs.network.wire import MODES, PORT

LABELS = {"edge-cloud": "edge-cloud", "plain": "cloud-only", "plain again": "cloud-only again"}
PLACES = {"edge": "draft", "network": "network", "cloud": "verify"}  # in a sample
PARTS = ("prefill", *PLACES, "other")
ASSESSMENTS = ((1.5, "EXCELLENT"), (1.3, "GOOD"), (1.1, "MODERATE"))
PATIENCE = 10.0  # seconds


def measure(
    decoder: Decoder, k: int, prompts: Sequence[Encoded], iterations: int, max_new_tokens: int
) -> dict[str, Any]:
    """Every arm on every prompt, as often as said.

    Returns:
        ``arms`` by name (see ``row``), the headline, and what it was made from.
    """
    plain, again = decoder.plain(), decoder.plain()
    arms = {
        "edge-cloud": decoded(decoder, static_chain(k, max(2, k))),
        "plain": decoded(plain, None),
        "plain again": decoded(again, None),
    }
    try:
        samples = run_arms(arms, [*prompts] * iterations, max_new_tokens, "edge and cloud")
    finally:
        for used in (decoder, plain, again):
            assert isinstance(used.verifier, RemoteVerifier)
            used.verifier.channel.close()
    rows = {name: row(found, samples["plain"]) for name, found in samples.items()}
    headline = rows["edge-cloud"]
    keys = ("acceptance", "latency_s", "network_s", "edge_s", "cloud_s", "bytes_up", "bytes_down", "breakdown")
    return {
        "speedup": headline["over_plain"]["value"],
        "speedup_interval": headline["over_plain"],
        "speedup_without_prefill": headline["over_plain_without_prefill"],
        "assessment": assessment(headline["over_plain"]["value"]),
        **{key: headline[key] for key in keys},
        "arms": rows,
        "prompts": len(prompts),
        "iterations": iterations,
        "max_new_tokens": max_new_tokens,
    }


def row(samples: Sequence[Sample], reference: Sequence[Sample]) -> dict[str, Any]:
    """Means per text of an arm, its breakdown in per cent, and ratios of tokens per second."""
    texts, verified = len(samples), sum(s.verified for s in samples)
    spent = {part: sum(s.parts[place] for s in samples) / texts for part, place in PLACES.items()}
    spent["prefill"] = sum(s.prefill_seconds for s in samples) / texts
    latency = sum(s.prefill_seconds + s.seconds for s in samples) / texts
    spent["other"] = max(0.0, latency - sum(spent.values()))
    own, others = (by_prompt([whole_text(s) for s in found]) for found in (samples, reference))
    return {
        "latency_s": latency,
        **{f"{part}_s": spent[part] for part in PARTS},
        "breakdown": {part: 100 * spent[part] / latency for part in PARTS},
        "acceptance": sum(s.accepted for s in samples) / verified if verified else None,
        "rounds": sum(s.cycles for s in samples) / texts,
        "tokens": sum(s.tokens + 1 for s in samples) / texts,
        "tokens_per_second": throughput(own),
        **{way: sum(vars(s)[way] for s in samples) / texts for way in ("bytes_up", "bytes_down")},
        "over_plain": ratio(own, others),
        "over_plain_without_prefill": ratio(by_prompt(samples), by_prompt(reference)),
    }


def whole_text(sample: Sample) -> Sample:
    """A sample whose seconds and tokens are those of the prefill, too."""
    return replace(sample, tokens=sample.tokens + 1, seconds=sample.seconds + sample.prefill_seconds)


def by_prompt(samples: Sequence[Sample]) -> list[Sample]:
    """One sample per prompt, with the tokens and seconds of all its iterations: intervals are over prompts."""
    pooled: dict[tuple[int, ...], Sample] = {}
    for sample in samples:
        key = tuple(sample.prompt.ids)
        had = pooled.get(key)
        pooled[key] = (
            replace(had, tokens=had.tokens + sample.tokens, seconds=had.seconds + sample.seconds) if had else sample
        )
    return list(pooled.values())


def assessment(speedup: float) -> str:
    """In a word: EXCELLENT above 50 % faster, GOOD above 30 %, MODERATE above 10 %, else POOR."""
    return next((word for bound, word in ASSESSMENTS if speedup > bound), "POOR")


def report(results: dict[str, Any]) -> str:
    """The tables as text."""
    lines = [
        "| arm | latency s | tokens/s | over cloud-only [95 %] | accepted | rounds | bytes up | bytes down |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results["arms"].items():
        accepted = "–" if found["acceptance"] is None else f"{100 * found['acceptance']:.0f} %"
        lines.append(
            f"| {LABELS[name]} | {found['latency_s']:.2f} | {found['tokens_per_second']:.1f} | "
            f"{interval(found['over_plain'])} | {accepted} | {found['rounds']:.1f} | {found['bytes_up']:,.0f} | "
            f"{found['bytes_down']:,.0f} |"
        )
    lines += ["", f"| seconds (share of latency) | {' | '.join(PARTS)} |", f"|---{'|---' * len(PARTS)}|"]
    for name, found in results["arms"].items():
        cells = [f"{found[f'{part}_s']:.3f} ({found['breakdown'][part]:.0f} %)" for part in PARTS]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    head = results["machine"]
    lines += [
        "",
        f"Means per text: {results['prompts']} held-out prompts × {results['iterations']}, at most "
        f"{results['max_new_tokens']} new tokens, temperature {results['temperature']:g}, drafts of {results['k']} tokens, "
        f"mode {results['mode']}, {results['link']}.",
        f"{head['processor']}, {head['threads']} threads, dtype {head['dtype']}; "
        f"{', '.join(f'{name} {v}' for name, v in head['versions'].items())}; revision {head['revision']}.",
    ]
    if results["prompts"] > 1:
        verdict = "contains" if aa_agrees(results) else "EXCLUDES"
        lines.append(f"A/A check (cloud-only twice): the interval {verdict} 1.")
    lines += [
        f"Without the prefill: {interval(results['speedup_without_prefill'])} × cloud-only.",
        f"Speedup over cloud-only: {interval(results['speedup_interval'])}: {results['assessment']}.",
    ]
    if "first_try" in results:
        again = {**results["first_try"], **{key: value for key, value in results.items() if key in SETTINGS}}
        lines += ["", "The first try, whose A/A interval excludes 1:", "", report(again)]
    return "\n".join(lines)


def interval(found: dict[str, float]) -> str:
    """A ratio, with its interval where there is one."""
    between = f" [{found['low']:.2f}, {found['high']:.2f}]" if found["low"] < found["high"] else ""
    return f"{found['value']:.2f}{between}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Where the seconds of a text go in every arm, and the speed over cloud-only."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1)
    rows = {LABELS[name]: found for name, found in results["arms"].items()}
    names, left = list(rows)[::-1], [0.0] * len(rows)
    for part in PARTS:
        seconds = [rows[name][f"{part}_s"] for name in names]
        top.barh(names, seconds, left=left, label=part, alpha=0.8)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    top.set_xlabel("seconds per text")
    top.legend(fontsize=8, ncols=len(PARTS))
    top.set_title(f"{results['link']}, temperature {results['temperature']:g}: {results['assessment']}", fontsize=10)
    draw_arms(bottom, rows, "plain")
    bottom.set_xlabel("tokens per second over cloud-only, prefill included, 95 % interval")
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


SETTINGS = ("target", "drafter", "temperature", "k", "mode", "top_k", "link", "own_cloud", "machine")


def edge_cloud(args: argparse.Namespace) -> dict[str, Any]:
    """Everything: the cloud, if none is given, the link, and the measurement."""
    own = args.host is None and args.port is None
    with ExitStack() as stack:
        if own:
            served = ["--target", args.target, "--device", args.device, "--dtype", args.dtype, "--sessions", "4"]
            url = stack.enter_context(cloud(*served))
        else:
            url = address(args.host or "localhost", args.port or PORT)
        if args.link:
            url = stack.enter_context(behind(args.link, url))
        names = ("target", "drafter", "device", "dtype", "temperature", "mode", "top_k", "k")
        settings = {name: getattr(args, name) for name in names}
        decoder = connected(url, **settings, patience=PATIENCE, token_in_clear=args.token_in_clear)
        prompts = {"target": args.target}

        def measured(count: int) -> dict[str, Any]:
            return measure(
                decoder, args.k, encoded_prompts(prompts, "test", count), args.iterations, args.max_new_tokens
            )

        results = with_aa_check(measured, args.num_prompts) if args.num_prompts > 1 else measured(1)
    where = f"over {args.link}" if args.link else "over loopback" if own else f"to {url}"
    settings = {name: getattr(args, name) for name in ("target", "drafter", "temperature", "k", "mode", "top_k")}
    if not args.temperature:
        settings["mode"] = "ids"
    head = machine(decoder)
    if own:
        dtype = resolve_dtype(args.dtype, resolve_device(args.device), [args.target])
        head["dtype"] = str(dtype).removeprefix("torch.")
    return results | settings | {"link": where, "own_cloud": own, "machine": head}


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--num-prompts", type=whole_number(1, 10), default=5, help="held-out prompts, 1 to 10 (default 5)"
    )
    parser.add_argument("--iterations", type=POSITIVE, default=2, help="times that each is answered (default 2)")
    parser.add_argument("--host", help="of the cloud, or its ws:// or wss:// URL (default: a cloud of its own)")
    parser.add_argument("--port", type=whole_number(1, 65535), help=f"of the cloud (default, with --host: {PORT})")
    parser.add_argument(
        "--token-in-clear", action="store_true", help="send the token to another machine without TLS, too"
    )
    parser.add_argument("--link", help="simulated link that a proxy in between imitates (markov-1-500, lte, …)")
    parser.add_argument(
        "--target", type=nonempty, default=DEFAULT_TARGET, help=f"that the cloud serves (default {DEFAULT_TARGET})"
    )
    parser.add_argument("--drafter", type=nonempty, default="auto", help="of chains (default: the target's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, int8, bfloat16 or float32")
    parser.add_argument("--temperature", type=TEMPERATURE, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--mode", choices=MODES, default="topk", help="how drafts are told (default topk)")
    parser.add_argument("--top-k", type=POSITIVE, default=300, help="probabilities sent of a draft (default 300)")
    parser.add_argument("--k", type=whole_number(1, LONGEST_DRAFT), default=4, help="tokens of a draft (default 4)")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=64, help="per text (default 64)")
    parser.add_argument("--out", type=output_folder, default=Path("runs"), help="folder of the results (default runs)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with one_sentence():
        if args.link:
            load_link(args.link)
        results = edge_cloud(args)
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "edge-cloud.json", results)
        draw(results, args.out / "edge-cloud.png")
        print(report(results))
        print(f"written: {args.out}/edge-cloud.json, edge-cloud.png")


if __name__ == "__main__":
    main()
