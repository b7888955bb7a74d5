"""Measure a cloud that serves many edges at once, with and without batching (`spec-envs bench cloud-load`).

Two clouds, one that batches requests and one that gives every request a forward of its own, are measured in turn with
1, 4 and 16 edges. The edges compute almost nothing: their drafts are recorded texts of the target with some wrong
tokens, and recordings are repeated. Decoding is greedy, and prompts are read before the measurement begins. Latency is
the time that a verification takes as an edge sees it. Writes cloud-load.json, cloud-load.md and cloud-load.png into
--out.
"""

from __future__ import annotations

import argparse
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier

import numpy as np
from tqdm import tqdm

from spec_envs.arguments import POSITIVE, Parser, add_model_arguments, number, whole_number
from spec_envs.decoding.weights.checkpoints import load_tokenizer, resolve_device, resolve_dtype
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.measure.machine import Machine, this_machine
from spec_envs.experiments.measure.results import Interval
from spec_envs.experiments.network.cloud_process import cloud
from spec_envs.experiments.reports.figures import drawn
from spec_envs.experiments.reports.pages import Page, add_page_arguments, counted, definitions, table
from spec_envs.network.cloud.engine import LONGEST_DRAFT
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.websocket import SocketChannel
from spec_envs.network.wire import VERSION, Hello, vocabulary_hash

SERVERS = {"batched": [], "unbatched": ["--no-batching"]}
TOKENS = 48  # tokens of a recording
WARM_UP = 3  # requests of every edge before its measurement


@dataclass(frozen=True)
class Recording:
    """A prompt and the target's answer to it."""

    prompt: list[int]
    text: list[int]


@dataclass
class Load:
    """The measurements of a cloud: seconds, latencies of the requests that were answered in time, and counts of
    tokens."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    emitted: int = 0
    drafted: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.seconds + other.seconds,
            self.latencies + other.latencies,
            self.emitted + other.emitted,
            self.drafted + other.drafted,
        )


@dataclass(frozen=True)
class Point:
    """The summary of one cloud with one number of edges, over all rounds. Percentiles are NaN if nothing was
    answered."""

    tokens_per_second: float
    p50_ms: float
    p99_ms: float
    requests: int
    acceptance: float

    @classmethod
    def of(cls, load: Load) -> Point:
        latencies, answered = load.latencies, len(load.latencies)
        p50, p99 = np.quantile(latencies, (0.5, 0.99)) if latencies else (math.nan,) * 2
        return cls(
            tokens_per_second=load.emitted / load.seconds,
            p50_ms=1000 * float(p50),
            p99_ms=1000 * float(p99),
            requests=answered,
            acceptance=(load.emitted - answered) / max(1, load.drafted),
        )


@dataclass(kw_only=True)
class CloudLoad:
    """Both clouds with every number of edges.

    Attributes:
        points: summaries by number of edges and by server.
        batched_over_unbatched: ratio of tokens per second over all rounds, with the smallest and the largest ratio of a
            round, by number of edges.
        k: tokens of a draft.
        wrong: share of wrong tokens in drafts.
        seconds: duration of every measurement.
    """

    points: dict[int, dict[str, Point]]
    batched_over_unbatched: dict[int, Interval]
    target: str
    k: int
    wrong: float
    seconds: float
    rounds: int
    machine: Machine


class Edge:
    """An edge that drafts from a recording.

    Args:
        verifier: greedy verifier that is connected to the cloud.
        k: tokens of a draft.
        wrong: probability that a drafted token is not the target's.
        seed: seed of the choice of wrong tokens.
    """

    def __init__(self, verifier: RemoteVerifier, recording: Recording, k: int, wrong: float, seed: int):
        self.verifier, self.recording, self.k, self.wrong = verifier, recording, k, wrong
        self.rng = np.random.default_rng(seed)
        self.verifier.start(recording.prompt, 0, self.rng)
        self.parents, self.levels = np.arange(k) - 1, np.arange(k)
        self.at = 1  # tokens of the answer so far

    def verify(self) -> int:
        """Send one request, and return the number of tokens that it emitted."""
        text = self.recording.text
        if self.at + self.k >= len(text):
            self.at = 1
        self._align()
        draft = np.array(text[self.at : self.at + self.k])
        draft = (draft + (self.rng.random(self.k) < self.wrong)) % self.verifier.vocab
        emitted = len(self.verifier.verify(draft, self.parents, self.levels).path) + 1
        self.at += emitted
        return emitted

    def _align(self) -> None:
        """Set the verifier's text to the recorded one. They differ when the recording starts again, and if the target
        decided a near-tie differently."""
        verifier, text = self.verifier, [*self.recording.prompt, *self.recording.text[: self.at]]
        if verifier.text != text:
            pairs = zip(verifier.text[: verifier.shared], text, strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(text))
            verifier.text, verifier.shared = text, min(verifier.shared, same)

    def until(self, barrier: Barrier, seconds: float) -> Load:
        """Send request after request for so many seconds, beginning when all edges are ready."""
        load = Load()
        try:
            for _ in range(WARM_UP):
                self.verify()
            barrier.wait()
        except BaseException:
            barrier.abort()  # the others must not wait for this one
            raise
        now = begin = time.perf_counter()
        while True:
            emitted, before = self.verify(), now
            now = time.perf_counter()
            if now - begin > seconds:
                return load
            load.latencies.append(now - before)
            load.emitted += emitted
            load.drafted += self.k


class Edges:
    """Makes recordings of one target, and edges that draft from them.

    Args:
        url: address of any cloud that serves the target.
    """

    def __init__(self, url: str, target: str):
        self.vocabulary = vocabulary_hash(load_tokenizer(target))
        channel = SocketChannel(url)
        hello = Hello(VERSION, self.vocabulary, secrets.token_bytes(16), 0.0, 1.0, 0)
        welcome, _ = channel.begin(hello, np.random.default_rng(0))
        self.vocab, self.context = welcome.vocab, welcome.context
        channel.close()

    def verifier(self, url: str) -> RemoteVerifier:
        """Return a greedy verifier at a cloud."""
        return RemoteVerifier(SocketChannel(url), self.vocabulary, self.vocab, self.context, temperature=0.0)

    def record(self, url: str, prompt: list[int]) -> Recording:
        """Return the target's answer to a prompt."""
        verifier = self.verifier(url)
        try:
            first = verifier.start(prompt, 0, np.random.default_rng(0))
            return Recording(prompt, [first, *verifier.decode(TOKENS, ())])
        finally:
            verifier.channel.close()

    def load(self, url: str, recordings: Sequence[Recording], k: int, wrong: float, seconds: float) -> Load:
        """Make one measurement, with an edge on its own thread for every recording."""
        barrier, verifiers = Barrier(len(recordings)), [self.verifier(url) for _ in recordings]

        def measure(i: int) -> Load:
            return Edge(verifiers[i], recordings[i], k, wrong, seed=i).until(barrier, seconds)

        try:
            with ThreadPoolExecutor(len(recordings)) as pool:
                loads = list(pool.map(measure, range(len(recordings))))
        finally:
            for verifier in verifiers:
                verifier.channel.close()
        return sum(loads, Load(seconds))


def cloud_load(args: argparse.Namespace) -> CloudLoad:
    """Measure both clouds in turn with every number of edges."""
    served = [
        "--target",
        args.target,
        "--device",
        args.device,
        "--dtype",
        args.dtype,
        "--sessions",
        str(max(args.edges)),
    ]
    loads: dict[tuple[int, str], list[Load]] = {(edges, name): [] for edges in args.edges for name in SERVERS}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(cloud(*served, *more)) for name, more in SERVERS.items()}
        edge_maker, url = Edges(urls["batched"], args.target), urls["batched"]
        prompts = encoded_prompts({"target": args.target}, "test", max(args.edges))
        recordings = [edge_maker.record(url, prompt.ids) for prompt in tqdm(prompts, desc="recording", unit="text")]
        with tqdm(total=args.rounds * len(loads), desc="load", unit="point") as bar:
            for turn in range(args.rounds):
                for edges in args.edges:
                    for name in sorted(SERVERS, reverse=turn % 2 == 1):
                        load = edge_maker.load(urls[name], recordings[:edges], args.k, args.wrong, args.seconds)
                        loads[edges, name].append(load)
                        bar.update()
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device, [args.target])
    return CloudLoad(
        points={edges: {name: Point.of(sum(loads[edges, name], Load())) for name in SERVERS} for edges in args.edges},
        batched_over_unbatched={
            edges: gain(loads[edges, "batched"], loads[edges, "unbatched"]) for edges in args.edges
        },
        target=args.target,
        k=args.k,
        wrong=args.wrong,
        seconds=args.seconds,
        rounds=args.rounds,
        machine=this_machine(device, dtype),
    )


def gain(batched: Sequence[Load], unbatched: Sequence[Load]) -> Interval:
    """Return the ratio of tokens per second over all rounds, with the smallest and the largest ratio of a round."""
    if not all(load.emitted for load in unbatched):
        return Interval(math.nan, math.nan, math.nan)
    rounds = [a.emitted / b.emitted for a, b in zip(batched, unbatched, strict=True)]
    value = sum(load.emitted for load in batched) / sum(load.emitted for load in unbatched)
    return Interval(value, min(rounds), max(rounds))


def body(results: CloudLoad) -> Iterable[str]:
    """Yield the lines of the page below its picture."""
    head = ["edges", "cloud", "tokens/s", "p50 ms", "p99 ms", "requests", "accepted", "batched over unbatched [rounds]"]
    rows = []
    for edges, servers in results.points.items():
        for name, point in servers.items():
            ratio = f"{results.batched_over_unbatched[edges]:.2f}" if name == "batched" else "–"
            cells = [str(edges), name, f"{point.tokens_per_second:.1f}", f"{point.p50_ms:.1f}", f"{point.p99_ms:.1f}"]
            rows.append([*cells, str(point.requests), f"{100 * point.acceptance:.0f} %", ratio])
    yield from table(head, rows)
    yield ""
    yield (
        f"- {counted(results.rounds, 'round')} of {results.seconds:g} s for each row, in turn; greedy drafts of {results.k} tokens "
        f"over loopback, {100 * results.wrong:g} % of them wrong on purpose; the target is {results.target}, and "
        "prompts are read before."
    )
    yield "- p50 and p99: time of a verification as an edge sees it. *Accepted*: share of the drafted tokens."
    yield (
        "- In brackets: the smallest and the largest ratio of a round. There is no A/A check; where they lie on both "
        "sides of 1, the clouds cannot be told apart."
    )
    yield ""
    yield from definitions(
        SERVERS,
        {
            "batched": "the cloud verifies the drafts that wait together in one forward "
            "([Over a network](../guides/network.md)).",
            "unbatched": "the same cloud, with a forward for every draft.",
        },
    )


def draw(results: CloudLoad, path: Path) -> None:
    """Draw tokens per second and latencies by number of edges."""
    with drawn(path, 9, 4) as figure:
        left, right = figure.subplots(1, 2)
        edges = list(results.points)
        for name in SERVERS:
            found = [results.points[n][name] for n in edges]
            line = left.plot(edges, [point.tokens_per_second for point in found], marker="o", label=name)
            color = line[0].get_color()
            right.plot(edges, [point.p50_ms for point in found], "o-", color=color, label=f"{name}, p50")
            right.plot(edges, [point.p99_ms for point in found], "x:", color=color, label=f"{name}, p99")
        left.set_ylabel("tokens/s of all edges")
        right.set_ylabel("milliseconds of a verification")
        right.set_yscale("log")
        for axis in (left, right):
            axis.set_xlabel("number of edges")
            axis.set_xticks(edges)
            axis.legend(fontsize=8)


PAGE = Page(
    kind=CloudLoad,
    command="bench cloud-load",
    title="A cloud under load",
    purpose="A cloud verifies the drafts of one and of many edges, with batching and without, to show how many edges it "
    "serves and what each of them waits.",
    caption="Tokens per second of all edges, and the time of a verification, by number of edges",
    body=body,
    machines=lambda results: [results.machine],
    draw=draw,
)


def numbers(text: str) -> list[int]:
    """Return the positive whole numbers that a text lists, separated by commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 1024 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} does not list numbers of edges; expected 1 to 1024, as in 1,4,16")
    return sorted({int(part) for part in parts})


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--edges", type=numbers, default="1,4,16", help="numbers of edges, separated by commas (default 1,4,16)"
    )
    parser.add_argument(
        "--seconds", type=number(0, above=True), default=10.0, help="seconds of every measurement (default 10)"
    )
    parser.add_argument("--rounds", type=POSITIVE, default=3, help="rounds of measurements (default 3)")
    parser.add_argument(
        "--k", type=whole_number(1, min(LONGEST_DRAFT, TOKENS // 2)), default=4, help="tokens of a draft (default 4)"
    )
    parser.add_argument(
        "--wrong", type=number(0, 1), default=0.15, help="share of wrong tokens in drafts (default 0.15)"
    )
    add_model_arguments(parser, "model to serve")
    add_page_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with one_sentence():
        PAGE.publish(args, lambda: cloud_load(args), "cloud-load")


if __name__ == "__main__":
    main()
