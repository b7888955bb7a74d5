"""Compare speculation between edge and cloud with the cloud alone, through a real socket (`spec-envs bench
edge-cloud`).

The arms are interleaved prompt by prompt: edge-cloud drafts here and lets a cloud verify; cloud-only streams the
cloud's own text, twice, to show the noise of the machine (A/A check). Without --host and --port a cloud is started on
this machine, which then does the work of both sides. Writes edge-cloud.json, edge-cloud.md and edge-cloud.png into
--out.

Seconds, bytes and tokens are means per text. Latency is the time of the whole text. Its parts are the prefill (with the
network time of the prompt) and, after the prefill, the edge (drafting), the network (without the cloud's computing and
queueing), the cloud, and the rest. The speedup compares tokens per second of the whole text, prefill included.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from spec_envs.arguments import (
    POSITIVE,
    TEMPERATURE,
    TOKENS,
    Parser,
    add_model_arguments,
    whole_number,
)
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.names import default_drafter
from spec_envs.decoding.weights.checkpoints import resolve_device, resolve_dtype
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.measure.arms import Encoded, Sample, decoded, run_arms
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.measure.machine import Machine, machine
from spec_envs.experiments.measure.results import Compared, Comparison, Interval
from spec_envs.experiments.measure.static import static_chain
from spec_envs.experiments.measure.statistics import ratio, throughput, with_aa_check
from spec_envs.experiments.network.cloud_process import cloud, over_link
from spec_envs.experiments.reports.figures import draw_arms, drawn
from spec_envs.experiments.reports.pages import Page, add_page_arguments, definitions, table
from spec_envs.network.cloud.engine import LONGEST_DRAFT
from spec_envs.network.edge.__main__ import address, connected
from spec_envs.network.link import load_link
from spec_envs.network.wire import MODES, PORT

LABELS = {"edge-cloud": "edge-cloud", "plain": "cloud-only", "plain again": "cloud-only again"}
PLACES = {"edge": "draft", "network": "network", "cloud": "verify"}  # to the parts of a sample
PARTS = ("prefill", *PLACES, "other")
ASSESSMENTS = ((1.5, "EXCELLENT"), (1.3, "GOOD"), (1.1, "MODERATE"))
PATIENCE = 10.0  # seconds to wait for the cloud


@dataclass(kw_only=True)
class Row(Compared):
    """An arm: means per text.

    Attributes:
        over: ratios of tokens per second to those of plain decoding, ``plain`` and ``plain_without_prefill``.
        seconds: seconds by part of the latency.
        breakdown: shares of the latency by part, in per cent.
        acceptance: accepted share of the verified tokens; None if nothing was drafted.
        rounds: number of cycles.
    """

    latency_s: float
    seconds: Annotated[dict[str, float], Inline(suffix="_s")]
    breakdown: dict[str, float]
    acceptance: float | None
    rounds: float
    tokens: float
    bytes_up: float
    bytes_down: float

    @classmethod
    def of(cls, samples: Sequence[Sample], reference: Sequence[Sample]) -> Row:
        texts, verified = len(samples), sum(s.verified for s in samples)
        spent = {part: sum(s.parts[place] for s in samples) / texts for part, place in PLACES.items()}
        spent["prefill"] = sum(s.prefill_seconds for s in samples) / texts
        latency = sum(s.prefill_seconds + s.seconds for s in samples) / texts
        spent["other"] = max(0.0, latency - sum(spent.values()))
        own, others = (by_prompt([whole_text(s) for s in found]) for found in (samples, reference))
        without_prefill = ratio(by_prompt(samples), by_prompt(reference))
        return cls(
            tokens_per_second=throughput(own),
            over={"plain": ratio(own, others), "plain_without_prefill": without_prefill},
            latency_s=latency,
            seconds=spent,
            breakdown={part: 100 * spent[part] / latency for part in PARTS},
            acceptance=sum(s.accepted for s in samples) / verified if verified else None,
            rounds=sum(s.cycles for s in samples) / texts,
            tokens=sum(s.tokens + 1 for s in samples) / texts,
            bytes_up=sum(s.bytes_up for s in samples) / texts,
            bytes_down=sum(s.bytes_down for s in samples) / texts,
        )


@dataclass(kw_only=True)
class Settings:
    """The models, how drafts are sent, and where the cloud runs (``own_cloud``: it was started for the measurement)."""

    target: str
    drafter: str
    temperature: float
    k: int
    mode: str
    top_k: int
    link: str
    own_cloud: bool
    machine: Machine


@dataclass(frozen=True)
class Headline:
    """The speedup of edge and cloud over the cloud alone, and their means per text."""

    speedup: float
    speedup_interval: Interval
    speedup_without_prefill: Interval
    assessment: str
    acceptance: float | None
    latency_s: float
    seconds: Annotated[dict[str, float], Inline(suffix="_s")]
    bytes_up: float
    bytes_down: float
    breakdown: dict[str, float]

    @classmethod
    def of(cls, own: Row) -> Headline:
        return cls(
            speedup=own.over["plain"].value,
            speedup_interval=own.over["plain"],
            speedup_without_prefill=own.over["plain_without_prefill"],
            assessment=assessment(own.over["plain"].value),
            acceptance=own.acceptance,
            latency_s=own.latency_s,
            seconds={place: own.seconds[place] for place in ("network", "edge", "cloud")},
            bytes_up=own.bytes_up,
            bytes_down=own.bytes_down,
            breakdown=own.breakdown,
        )


@dataclass(kw_only=True)
class EdgeCloud(Comparison):
    """Edge and cloud together, and the cloud alone twice, each ``iterations`` times on the same prompts."""

    arms: dict[str, Row]
    prompts: int
    iterations: int
    max_new_tokens: int
    settings: Annotated[Settings, Inline()]
    headline: Annotated[Headline, Inline()]
    first_try: EdgeCloud | None = None


def measure(
    decoder: Decoder, settings: Settings, prompts: Sequence[Encoded], iterations: int, max_new_tokens: int
) -> EdgeCloud:
    """Run every arm on every prompt, ``iterations`` times."""
    plain, again = decoder.plain(), decoder.plain()
    arms = {
        "edge-cloud": decoded(decoder, static_chain(settings.k, max(2, settings.k))),
        "plain": decoded(plain, None),
        "plain again": decoded(again, None),
    }
    try:
        samples = run_arms(arms, [*prompts] * iterations, max_new_tokens, "edge and cloud")
    finally:
        for used in (decoder, plain, again):
            used.close()
    rows = {name: Row.of(found, samples["plain"]) for name, found in samples.items()}
    return EdgeCloud(
        arms=rows,
        headline=Headline.of(rows["edge-cloud"]),
        prompts=len(prompts),
        iterations=iterations,
        max_new_tokens=max_new_tokens,
        settings=settings,
    )


def whole_text(sample: Sample) -> Sample:
    """Return a sample with the seconds and the token of the prefill added."""
    return replace(sample, tokens=sample.tokens + 1, seconds=sample.seconds + sample.prefill_seconds)


def by_prompt(samples: Sequence[Sample]) -> list[Sample]:
    """Return one sample per prompt, with the tokens and seconds of all its iterations, because intervals are over
    prompts."""
    pooled: dict[tuple[int, ...], Sample] = {}
    for sample in samples:
        key = tuple(sample.prompt.ids)
        had = pooled.get(key)
        pooled[key] = (
            replace(had, tokens=had.tokens + sample.tokens, seconds=had.seconds + sample.seconds) if had else sample
        )
    return list(pooled.values())


def assessment(speedup: float) -> str:
    """Return a word for a speedup: EXCELLENT above 1.5, GOOD above 1.3, MODERATE above 1.1, else POOR."""
    return next((word for bound, word in ASSESSMENTS if speedup > bound), "POOR")


def body(results: EdgeCloud) -> Iterable[str]:
    """Yield the lines of the page below its picture."""
    settings, found = results.settings, results.headline
    yield f"- Speedup over cloud-only: {interval(found.speedup_interval)}: {found.assessment}."
    yield f"- Without the prefill: {interval(found.speedup_without_prefill)} × cloud-only."
    yield (
        f"- Means per text: {results.prompts} held-out prompts × {results.iterations}, at most "
        f"{results.max_new_tokens} new tokens, temperature {settings.temperature:g}, drafts of {settings.k} tokens, "
        f"mode {settings.mode}, {settings.link}; target {settings.target}, drafter {settings.drafter}."
    )
    if results.prompts > 1:
        yield f"- {results.aa_check('cloud-only')}"
    yield ""
    yield from arms(results)
    if results.first_try:
        yield from ("", "The first try, with an A/A interval that excludes 1:", "", *arms(results.first_try))
    yield ""
    where = "a cloud on this machine, which does the work of both sides," if settings.own_cloud else "the cloud"
    yield from definitions(
        LABELS.values(),
        {
            "edge-cloud": f"the edge drafts and {where} verifies ([Over a network](../guides/network.md)).",
            "cloud-only": "the cloud decodes alone and streams its text.",
            "cloud-only again": "the same once more, for the [A/A check](index.md#how-a-number-is-made).",
        },
    )


def arms(results: EdgeCloud) -> Iterable[str]:
    """Yield the lines of two tables: speed and traffic of every arm, and the parts of its latency."""
    head = ["arm", "latency s", "tokens/s", "over cloud-only [95 %]", "accepted", "rounds", "bytes up", "bytes down"]
    yield from table(
        head,
        [
            [
                LABELS[name],
                f"{row.latency_s:.2f}",
                f"{row.tokens_per_second:.1f}",
                interval(row.over["plain"]),
                "–" if row.acceptance is None else f"{100 * row.acceptance:.0f} %",
                f"{row.rounds:.1f}",
                f"{row.bytes_up:,.0f}",
                f"{row.bytes_down:,.0f}",
            ]
            for name, row in results.arms.items()
        ],
    )
    yield ""
    yield from table(
        ["seconds (share of latency)", *PARTS],
        [
            [LABELS[name], *(f"{row.seconds[part]:.3f} ({row.breakdown[part]:.0f} %)" for part in PARTS)]
            for name, row in results.arms.items()
        ],
    )


def interval(ratio: Interval) -> str:
    """Return a ratio as text, with its interval if it has one."""
    return f"{ratio:.2f}" if ratio.low < ratio.high else f"{ratio.value:.2f}"


def draw(results: EdgeCloud, path: Path) -> None:
    """Draw the seconds per text by part for every arm, and the speed over cloud-only."""
    with drawn(path, 9, 6) as figure:
        top, bottom = figure.subplots(2, 1)
        rows = {LABELS[name]: row for name, row in results.arms.items()}
        names, left = list(rows)[::-1], [0.0] * len(rows)
        for part in PARTS:
            seconds = [rows[name].seconds[part] for name in names]
            top.barh(names, seconds, left=left, label=part, alpha=0.8)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        top.set_xlabel("seconds per text")
        top.legend(fontsize=8, ncols=len(PARTS))
        title = f"{results.settings.link}, temperature {results.settings.temperature:g}: {results.headline.assessment}"
        top.set_title(title, fontsize=10)
        draw_arms(bottom, rows, "plain")
        bottom.set_xlabel("tokens per second over cloud-only, prefill included, 95 % interval")


PAGE = Page(
    kind=EdgeCloud,
    command="bench edge-cloud",
    title="Edge and cloud",
    purpose="An edge that drafts for a cloud is compared with the cloud alone through a real socket, to show where the "
    "time of a text goes and whether drafting far from the target pays.",
    caption="Seconds per text by part, and the speed over the cloud alone",
    body=body,
    machines=lambda results: [results.settings.machine],
    draw=draw,
)


def edge_cloud(args: argparse.Namespace) -> EdgeCloud:
    """Start the cloud unless one is given, start the link if there is one, and measure."""
    own = args.host is None and args.port is None
    with ExitStack() as stack:
        if own:
            served = ["--target", args.target, "--device", args.device, "--dtype", args.dtype, "--sessions", "4"]
            url = stack.enter_context(cloud(*served))
        else:
            url = address(args.host or "localhost", args.port or PORT)
        where = f"over {args.link}" if args.link else "over loopback" if own else f"to {url}"
        if args.link:
            url = stack.enter_context(over_link(args.link, url))
        names = ("target", "drafter", "device", "dtype", "temperature", "mode", "top_k", "k")
        given = {name: getattr(args, name) for name in names}
        decoder = connected(url, **given, patience=PATIENCE, token_in_clear=args.token_in_clear)
        about = machine(decoder)
        if own:
            dtype = resolve_dtype(args.dtype, resolve_device(args.device), [args.target])
            about = replace(about, dtype=dtype)
        settings = Settings(
            target=args.target,
            drafter=default_drafter(args.target, chain=True) if args.drafter == "auto" else args.drafter,
            temperature=args.temperature,
            k=args.k,
            mode=args.mode if args.temperature else "ids",
            top_k=args.top_k,
            link=where,
            own_cloud=own,
            machine=about,
        )

        def measured(count: int) -> EdgeCloud:
            prompts = encoded_prompts({"target": args.target}, "test", count)
            return measure(decoder, settings, prompts, args.iterations, args.max_new_tokens)

        return with_aa_check(measured, args.num_prompts) if args.num_prompts > 1 else measured(1)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--num-prompts", type=whole_number(1, 10), default=5, help="number of held-out prompts, 1 to 10 (default 5)"
    )
    parser.add_argument("--iterations", type=POSITIVE, default=2, help="times that each prompt is answered (default 2)")
    parser.add_argument(
        "--host", help="host of the cloud, or its ws:// or wss:// URL (default: a cloud is started here)"
    )
    parser.add_argument("--port", type=whole_number(1, 65535), help=f"port of the cloud (default with --host: {PORT})")
    parser.add_argument(
        "--token-in-clear", action="store_true", help="send the token to another machine even without TLS"
    )
    parser.add_argument("--link", help="simulated link that a proxy imitates (markov-1-500, lte, …)")
    add_model_arguments(parser, "model that the cloud serves", "drafter of chains")
    parser.add_argument("--temperature", type=TEMPERATURE, default=1.0, help="0 is greedy (default 1)")
    parser.add_argument("--mode", choices=MODES, default="topk", help="how drafts are sent (default topk)")
    parser.add_argument(
        "--top-k", type=POSITIVE, default=300, help="probabilities that are sent for each drafted token (default 300)"
    )
    parser.add_argument("--k", type=whole_number(1, LONGEST_DRAFT), default=4, help="tokens of a draft (default 4)")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=64, help="most new tokens per text (default 64)")
    add_page_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with one_sentence():
        if args.link:
            load_link(args.link)
        PAGE.publish(args, lambda: edge_cloud(args), "edge-cloud")


if __name__ == "__main__":
    main()
