"""The cloud in a process of its own: whatever happens to connections, messages and the cloud, texts are as they should be."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer
from spec_envs.network.cloud.batching import Batcher
from spec_envs.network.cloud.engine import Engine
from spec_envs.network.cloud.metrics import Metrics
from spec_envs.network.cloud.server import Cloud, Limits
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.websocket import CloudAway, SocketChannel
from spec_envs.network.wire import (
    CODES,
    MODES,
    VERSION,
    Error,
    Hello,
    Plain,
    Refused,
    Sent,
    Tokens,
    Verdict,
    Verify,
    Welcome,
    decode,
    encode,
    pack_floats,
    pack_ids,
    vocabulary_hash,
)
from tests.conftest import CPU, WORDS
from tests.support.cloud_process import CloudProcess, Fault, Meddler

VOCAB = len(WORDS)
PROMPT = [3, 4, 5]
KINDS = ["ids", "scalar", "topk", "full", "plain", "mixed"]
Edges = Callable[..., "Edge"]


class Edge:
    """Writes texts with a cloud.

    Args:
        kind: how the distributions of drafts are told; ``ids`` is greedy decoding, ``plain`` the cloud's own text as it
            streams it, ``mixed`` drafts and such streams by turns.
        others: of the channel.
    """

    def __init__(self, url: str, target: str, draft: str, kind: str = "topk", **others: Any):
        self.decoder = load_decoder(
            target, draft, "cpu", "float32", width=1, max_depth=7, temperature=float(kind != "ids")
        )
        self.kind, channel = kind, SocketChannel(url, **others)
        own = self.decoder.verifier
        self.decoder.verifier = verifier = RemoteVerifier(
            channel, vocabulary_hash(load_tokenizer(target)), own.vocab, own.context, own.temperature, own.top_p
        )
        if kind == "plain":
            self.decoder = Decoder(verifier.plain(), None, self.decoder.clock, ())
        elif kind != "ids":
            verifier.mode = "topk" if kind == "mixed" else kind
            self.decoder.drafter.top_k = 5  # type: ignore[union-attr]
        self.decoder.eos = frozenset()

    @property
    def channel(self) -> SocketChannel:
        return self.decoder.verifier.channel  # type: ignore[attr-defined]

    def start(self, count: int, seed: int = 1) -> None:
        """Begin a text of ``count`` tokens."""
        self.decoder.start(PROMPT, count, np.random.default_rng(seed))

    def go_on(self, tokens: int = 2**31) -> list[int]:
        """The text when it has so many tokens."""
        while not self.decoder.finished and len(self.decoder.tokens) < tokens:
            if self.kind == "mixed" and len(self.decoder.cycles) % 2:
                self.decoder.decode(5)
            else:
                self.decoder.cycle(0 if self.kind == "plain" else 4)
        return self.decoder.tokens

    def text(self, count: int, seed: int = 1) -> list[int]:
        """A whole text; the channel is closed."""
        self.start(count, seed)
        tokens = self.go_on()
        self.channel.close()
        return tokens


@pytest.fixture(scope="module")
def options(tiny_target: Path) -> list[str]:
    """Of a cloud with the tiny target."""
    return ["--target", str(tiny_target), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def cloud(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudProcess]:
    """One for all tests that do not end it, which forgets soon."""
    with CloudProcess(tmp_path_factory.mktemp("cloud"), *options, "--idle", "2", "--max-message", "4096") as process:
        yield process


@pytest.fixture(scope="module")
def edges(tiny_target: Path, tiny_draft: Path) -> Edges:
    """Makes edges from an address and the arguments of ``Edge``."""

    def make(url: str, kind: str = "topk", **others: Any) -> Edge:
        """One whose drafts are kept and refused by turns: the target drafts for itself, but of few tokens."""
        return Edge(url, str(tiny_target), str(tiny_draft if kind == "ids" else tiny_target), kind, **others)

    return make


@pytest.fixture(scope="module")
def hello(tiny_target: Path) -> Hello:
    return Hello(VERSION, vocabulary_hash(load_tokenizer(str(tiny_target))), bytes(16), 1.0, 1.0, 5)


@pytest.fixture(scope="module")
def texts(cloud: CloudProcess, edges: Edges) -> dict[str, list[int]]:
    """Of 40 tokens, by kind, that nobody disturbed."""
    return {kind: edges(cloud.url, kind).text(40) for kind in KINDS}


def test_texts_differ_by_seed_and_are_repeated(cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]]) -> None:
    for kind in KINDS:
        assert edges(cloud.url, kind).text(40) == texts[kind]
        assert (edges(cloud.url, kind).text(40, 2) == texts[kind]) == (kind == "ids")


def test_a_cloud_killed_in_the_middle_of_texts(
    options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path
) -> None:
    with CloudProcess(tmp_path, *options) as cloud:
        under_way = {kind: edges(cloud.url, kind) for kind in KINDS}
        for edge in under_way.values():
            edge.start(40)
        for at in (10, 25):
            for edge in under_way.values():
                edge.go_on(at)
            cloud.restart()
        assert {kind: edge.go_on() for kind, edge in under_way.items()} == texts


def test_a_cloud_killed_in_the_middle_of_a_stream(
    options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path
) -> None:
    with CloudProcess(tmp_path, *options) as cloud, Meddler(cloud.url) as between:

        async def kill(number: int, source: str, frame: Any) -> list[Any] | None:
            if number != 12:
                return [frame]
            await asyncio.to_thread(cloud.restart)
            return None

        between.reset(kill)
        edge = edges(between.url)
        edge.start(40)
        assert edge.decoder.tokens + edge.decoder.verifier.decode(39, ()) == texts["plain"]
        assert between.passed > 40


def cut(at: int, delivered: bool) -> Fault:
    """The connection is lost at a message, which still comes through or does not."""

    async def fault(number: int, source: str, frame: Any) -> list[Any] | None:
        return [frame] if number < at or (delivered and number == at) or number > at + delivered else None

    return fault


def damaged(at: int, damage: Callable[[bytes], Any]) -> Fault:
    """One message is another when it comes."""

    async def fault(number: int, source: str, frame: Any) -> list[Any] | None:
        return [damage(frame) if number == at else frame]

    return fault


def stalled(at: int) -> Fault:
    """A message never comes, and nothing behind it."""

    async def fault(number: int, source: str, frame: Any) -> list[Any] | None:
        if number == at:
            await asyncio.Event().wait()
        return [frame]

    return fault


def everywhere(
    between: Meddler, edges: Edges, kind: str, expected: list[int], faults: Callable[[int], Fault], **others: Any
) -> None:
    """A text is what it should be with a fault at its first message, at its second one, and so on."""
    at, passed = 0, 1
    while at < passed:
        at += 1
        between.reset(faults(at))
        assert edges(between.url, kind, **others).text(len(expected)) == expected, at
        passed = between.passed
    assert at > 6


@pytest.mark.parametrize("kind", KINDS)
def test_connections_lost_at_every_message(
    cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]], kind: str
) -> None:
    expected = edges(cloud.url, kind).text(8)
    with Meddler(cloud.url) as between:
        everywhere(between, edges, kind, expected, lambda at: cut(at, False))
        if kind == "mixed":
            everywhere(between, edges, kind, expected, lambda at: cut(at, True))


def test_a_stalled_connection_is_opened_anew_though_patience_is_at_its_end(
    cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]]
) -> None:
    with Meddler(cloud.url) as between:
        between.reset(stalled(7))
        assert edges(between.url, timeout=2.5, patience=2.0).text(40) == texts["topk"]


DAMAGES: dict[str, Callable[[bytes], Any]] = {
    "truncated": lambda frame: frame[: len(frame) // 2],
    "empty": lambda frame: b"",
    "garbled": lambda frame: bytes(255 - byte for byte in frame),
    "text": lambda frame: "text",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "stalled"])
def test_messages_damaged_or_stalled(cloud: CloudProcess, edges: Edges, damage: str) -> None:
    expected = edges(cloud.url, "mixed").text(6)
    with Meddler(cloud.url) as between:
        if damage == "stalled":
            everywhere(between, edges, "mixed", expected, stalled, timeout=0.2)
        else:
            everywhere(between, edges, "mixed", expected, lambda at: damaged(at, DAMAGES[damage]))


@pytest.mark.parametrize("kind", KINDS)
def test_messages_delayed_or_doubled(cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]], kind: str) -> None:
    before: dict[str, Any] = {}

    async def delayed(number: int, source: str, frame: Any) -> list[Any]:
        await asyncio.sleep(0.03 * (number % 4 == 0))
        return [frame]

    async def twice(number: int, source: str, frame: Any) -> list[Any]:
        return [frame, frame]

    async def late(number: int, source: str, frame: Any) -> list[Any]:
        frames = [frame, *([before[source]] if source in before else [])]
        before[source] = frame
        return frames

    with Meddler(cloud.url) as between:
        for fault in (delayed, twice, late):
            before.clear()
            between.reset(fault)
            edge = edges(between.url, kind, timeout=30.0)
            begin = time.monotonic()
            for count in (15, 40):  # two texts on one connection
                edge.start(count)
                assert edge.go_on() == texts[kind][:count]
            edge.channel.close()
            assert time.monotonic() - begin < 30.0


@pytest.mark.parametrize("kind", KINDS)
def test_broken_off_streams_disturb_nobody(
    cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]], kind: str
) -> None:
    edge = edges(cloud.url, kind)
    verifier = edge.decoder.verifier
    for _ in range(3):
        verifier.start(PROMPT, 400, np.random.default_rng(7))
        stream = verifier._stream(300, ())  # type: ignore[attr-defined]
        for _ in range(3):
            next(stream)
        edge.start(40)
        assert edge.go_on() == texts[kind]


def say(url: str, *frames: Any, **others: Any) -> list[Any]:
    """The answers to frames, and the code with which the connection was closed."""
    answers: list[Any] = []
    with connect(url, compression=None, proxy=None, **others) as connection:
        with contextlib.suppress(ConnectionClosed):
            for frame in frames:
                connection.send(frame)
        try:
            while True:
                answers.append(decode(connection.recv(timeout=10)))
        except ConnectionClosed as closed:
            return [*answers, closed.rcvd.code if closed.rcvd else None]


def test_what_is_no_message_of_the_protocol_is_refused(
    cloud: CloudProcess, edges: Edges, hello: Hello, texts: dict[str, list[int]]
) -> None:
    first, ids = encode(hello), pack_ids(PROMPT, VOCAB)
    ask = Verify(1, 0, ids, b"", "ids")
    cases: list[tuple[str, list[Any]]] = [
        ("message", [b"\xc1 garbage"]),
        ("message", [b""]),
        ("message", ["text"]),
        ("message", [first[:-1]]),
        ("message", [first + b"x"]),
        ("message", [b"\xdd\xff\xff\xff\xff"]),
        ("message", [b"\x91" * 4000]),
        ("message", [first, b""]),
        ("message", [first, "text"]),
        ("message", [encode(ask)]),
        ("message", [encode(Plain(1, 0, ids, 4, b""))]),
        ("message", [first, encode(Welcome(0, 0, 0))]),
        ("message", [first, encode(Verdict(1, 0, 3, 0.0, 0.0))]),
        ("message", [first, encode(Tokens(1, 3, True, 0.0, 0.0, 0))]),
        ("message", [first, encode(Error("busy", "you are"))]),
        ("message", [first, encode(ask).replace(b"ids", b"\xff\xfe\xfd")]),
        ("version", [encode(replaced(hello, version=VERSION + 1))]),
        ("vocabulary", [encode(replaced(hello, vocabulary=bytes(16)))]),
        ("request", [first, encode(replaced(ask, at=1))]),
        ("request", [first, encode(replaced(ask, text=b""))]),
        ("request", [first, encode(replaced(ask, mode="none"))]),
        ("request", [first, encode(replaced(ask, text=b"\xff\xff"))]),
        ("limit", [first, encode(Plain(1, 0, ids, 2046, b""))]),
        ("limit", [first, encode(replaced(ask, draft=bytes(2 * 65), mode="topk"))]),
    ]
    for code, frames in cases:
        *answers, error, closed = say(cloud.url, *frames)
        assert (error.code, closed) == (code, 1008), (frames, error)
        assert error.sentence and "\n" not in error.sentence
        assert all(isinstance(answer, Welcome) for answer in answers)
    assert say(cloud.url, bytes(5000)) == [1009]
    assert say(cloud.url, first, bytes(5000))[-1] == 1009
    assert edges(cloud.url).text(40) == texts["topk"]


def replaced(message: Any, **fields: Any) -> Any:
    """A message with other fields."""
    return type(message)(**{name: getattr(message, name) for name in message.__struct_fields__} | fields)


def test_bytes_that_are_no_websocket_and_edges_that_do_not_read(
    cloud: CloudProcess, edges: Edges, hello: Hello, texts: dict[str, list[int]]
) -> None:
    """The latter are dropped, or their connection would last for ever."""
    address = ("127.0.0.1", cloud.port)
    rng = np.random.default_rng(0)
    for data in (
        b"",
        b"\r\n" * 10,
        rng.bytes(500),
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300,
        b"POST /metrics HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(address) as raw:
            raw.sendall(data)
    with connect(cloud.url, compression=None, proxy=None) as half:
        half.socket.sendall(b"\x82\xfe\x00")  # a frame that does not go on
        half.socket.shutdown(socket.SHUT_WR)
    raw = socket.create_connection(address)
    raw.settimeout(1.0)
    raw.sendall(
        b"GET / HTTP/1.1\r\nHost: cloud\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n\r\n"
    )
    greeting = encode(replaced(hello, session=b"n" * 16))
    frames = (b"\x82" + bytes([128 + len(greeting)]) + bytes(4) + greeting) * 1000
    with pytest.raises(TimeoutError):
        while True:
            raw.sendall(frames)
    raw.settimeout(10.0)
    with pytest.raises(ConnectionError):
        raw.sendall(frames * 1000)
    raw.close()
    assert edges(cloud.url).text(40) == texts["topk"]


def test_edges_that_do_not_fit_get_one_sentence(
    options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CloudProcess(tmp_path, *options, SPEC_ENVS_TOKEN="secret") as cloud:
        wants = "wants a bearer token; set SPEC_ENVS_TOKEN to its own"
        for token in ("", "wrong"):
            with pytest.raises(ValueError, match=wants):
                edges(cloud.url, token=token).start(40)
        assert cloud.page("/healthz") == (200, "ok\n") and cloud.page("/metrics")[0] == 401
        assert "spec_envs_cloud_sessions 0.0" in cloud.page("/metrics", Authorization="Bearer secret")[1]
        assert cloud.page("/other", Authorization="Bearer secret")[0] == 404
        assert edges(cloud.url, token="secret").text(40) == texts["topk"]
        monkeypatch.setenv("SPEC_ENVS_TOKEN", "secret")
        other = edges(cloud.url)
        other.decoder.verifier.vocabulary = bytes(16)  # type: ignore[attr-defined]
        with pytest.raises(
            ValueError, match=r"^the cloud at ws:\S+ refused: the edge's tokenizer is not the target's; give both"
        ):
            other.start(40)
        monkeypatch.setattr("spec_envs.network.edge.remote.VERSION", VERSION + 1)
        with pytest.raises(
            ValueError, match=r"refused: the edge speaks version 2, this cloud 1; update the older one$"
        ):
            edges(cloud.url).start(40)
    with pytest.raises(CloudAway, match=r"does not answer \(.*refused.*\); start one with `make cloud`, or check the"):
        edges(cloud.url, patience=0.3).start(40)


def test_a_cloud_that_cannot_start_says_why_in_one_sentence(
    cloud: CloudProcess, options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "pem").write_text("no certificate")
    cases = {
        "host is 0.0.0.0, which others can reach; set the environment variable SPEC_ENVS_TOKEN to a secret that edges have "
        "to bear, or listen on 127.0.0.1": ["--host", "0.0.0.0"],
        "TLS needs both --tls-certificate and --tls-key": ["--tls-key", str(tmp_path / "pem")],
        f"could not load the TLS certificate {tmp_path}/pem with the key {tmp_path}/pem (": [
            *("--tls-certificate", str(tmp_path / "pem")),
            *("--tls-key", str(tmp_path / "pem")),
        ],
        f"could not listen on 127.0.0.1:{cloud.port} (Address already in use); choose another address": [
            "--port",
            str(cloud.port),
        ],
        "--port is 70000; expected 0 to 65535": ["--port", "70000"],
        "--sessions is 0; expected 1 to 65536": ["--sessions", "0"],
    }
    command = [sys.executable, "-m", "spec_envs.network.cloud", *options, "--sessions", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as real:
        processes = [CloudProcess(tmp_path, *options, *arguments) for arguments in cases.values()]
        for sentence, process in zip(cases, processes, strict=True):
            assert process.end() == 1
            assert process.said.startswith(f"error: {sentence}") and process.said.count("\n") == 1, process.said
        assert real.communicate(timeout=60)[1] == f"error: {sentence}\n" and real.returncode == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls(options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path, monkeypatch: Any) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=cloud", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    pem = str(tmp_path / "certificate.pem")
    with CloudProcess(tmp_path, *options, "--tls-certificate", pem, "--tls-key", str(tmp_path / "key.pem")) as cloud:
        assert cloud.url.startswith("wss://")
        begin = time.monotonic()
        with pytest.raises(CloudAway, match="certificate verify failed"):
            edges(cloud.url).start(40)
        assert time.monotonic() - begin < 5
        with pytest.raises(CloudAway):
            edges(cloud.url.replace("wss", "ws"), patience=0.3).start(40)
        monkeypatch.setenv("SSL_CERT_FILE", pem)
        for kind in ("topk", "mixed"):
            edge = edges(cloud.url, kind)
            edge.start(40)
            edge.go_on(10)
            edge.channel._drop()
            assert edge.go_on() == texts[kind]


def wait_for(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < 20
        time.sleep(0.05)


def test_many_edges_and_one_that_misbehaves(cloud: CloudProcess, edges: Edges, hello: Hello) -> None:
    count, expected = 6, {kind: edges(cloud.url, kind).text(6) for kind in KINDS}
    first, ids = encode(hello), pack_ids(PROMPT, VOCAB)
    over = threading.Event()

    def misbehave() -> None:
        rng, turn = np.random.default_rng(0), 0
        while not over.is_set():
            turn += 1
            key = rng.bytes(16)
            own = encode(replaced(hello, session=key))
            say(cloud.url, [b"", rng.bytes(100), own[:20], bytes(5000)][turn % 4])
            say(cloud.url, own, encode(Plain(1, 0, ids, 2**20, b"")))
            with connect(cloud.url, compression=None, proxy=None) as lost:
                for frame in (own, encode(Plain(1, 0, ids, 1000, b"")), own, encode(Verify(2, 0, ids, b"", "ids"))):
                    lost.send(frame)
                lost.socket.sendall(b"\x82\xfe\x00")
                lost.close_socket()
            with connect(cloud.url, compression=None, proxy=None) as taken, ThreadPoolExecutor(1) as pool:
                taken.send(own)  # the session of a connection that may still have it
                taken.send(encode(Plain(1, 0, ids, 500, b"")))
                other = encode(replaced(hello, session=key, temperature=0.0))
                pool.submit(say, cloud.url, other, encode(Verify(1, 0, ids, ids, "ids")), b"").result()
            say(cloud.url, first[:-1])

    sizes = []
    for _ in range(4):
        over.clear()
        with ThreadPoolExecutor(33) as pool:
            bad = pool.submit(misbehave)
            texts = {}
            for i in range(31):
                kind = KINDS[i % len(KINDS)]
                texts[i] = pool.submit(edges(cloud.url, kind).text, count)
            for i, text in texts.items():
                assert text.result() == expected[KINDS[i % len(KINDS)]]
            over.set()
            bad.result()
        wait_for(lambda: cloud.metric("sessions") == 0)
        sizes.append(cloud.resident)
    assert sizes[-1] - sizes[0] < 8 * 1024, sizes
    assert 'refused_total{code="message"}' in cloud.page("/metrics")[1]


def test_more_edges_than_sessions(
    options: list[str], edges: Edges, texts: dict[str, list[int]], hello: Hello, tmp_path: Path
) -> None:
    with CloudProcess(tmp_path, *options, "--sessions", "2", "--idle", "4") as cloud, ThreadPoolExecutor(1) as pool:
        one, two = edges(cloud.url), edges(cloud.url)
        for edge in (one, two):
            edge.start(15, 2)
            edge.go_on()
            edge.start(40)  # another text takes the place of the last one
            edge.go_on(10)
        assert cloud.metric("sessions") == 2
        with pytest.raises(CloudAway, match=r"all 2 sessions are taken; try again later\); start one with"):
            edges(cloud.url, patience=0.3).start(40)
        third = pool.submit(edges(cloud.url).text, 40)
        time.sleep(0.3)
        assert not third.done()
        one.channel._drop()
        assert third.result() == texts["topk"]  # in the place of one that is lost
        assert one.go_on() == two.go_on() == texts["topk"]
        assert cloud.metric("sessions") == 2

        two.start(40)
        two.go_on(10)
        wait_for(lambda: cloud.metric("sessions") == 0)  # silent, closed, and in the end forgotten
        assert two.channel.connection is not None
        with pytest.raises(ConnectionClosed):
            two.channel.connection.recv(timeout=5)
        assert two.go_on() == texts["topk"]
        two.channel.close()

        held = [connect(cloud.url, proxy=None).__enter__() for _ in range(4)]
        with pytest.raises(CloudAway, match="HTTP 503"):
            edges(cloud.url, patience=0.3).start(40)
        for connection in held:
            connection.close()
        assert edges(cloud.url).text(40) == texts["topk"]


def test_a_stream_that_lasts_longer_than_silence_may(options: list[str], edges: Edges, tmp_path: Path) -> None:
    with CloudProcess(tmp_path, *options, "--idle", "0.4") as cloud:
        edge = edges(cloud.url)
        edge.start(1500)
        begin, connection = time.monotonic(), edge.channel.connection
        edge.decoder.verifier.decode(1400, ())
        assert time.monotonic() - begin > 0.8 and edge.channel.connection is connection


def test_a_cloud_that_is_ended_lets_texts_come_to_their_end(
    options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path
) -> None:
    with CloudProcess(tmp_path, *options) as cloud:
        edge = edges(cloud.url, "mixed")
        edge.start(40)
        edge.go_on(10)
        cloud.process.terminate()
        wait_for(lambda: cloud.page("/healthz") == (503, "draining\n"))
        with pytest.raises(CloudAway, match="the cloud is shutting down and takes no new texts"):
            edges(cloud.url, patience=0.3).start(40)
        edge.go_on(20)
        edge.channel._drop()  # its text is still there when it comes back
        assert edge.go_on() == texts["mixed"] and cloud.process.is_alive()
        edge.channel.close()
        assert cloud.end(5) == 0
    with CloudProcess(tmp_path, *options, "--grace", "0.1") as cloud, ThreadPoolExecutor(len(KINDS)) as pool:
        under_way = {kind: pool.submit(edges(cloud.url, kind).text, 40) for kind in KINDS}
        wait_for(lambda: cloud.metric("sessions") == len(KINDS))
        cloud.process.terminate()
        assert cloud.end(10) == 0 and "Traceback" not in cloud.said
        cloud.launch()
        assert {kind: text.result() for kind, text in under_way.items()} == texts


def test_metrics_count(options: list[str], edges: Edges, tmp_path: Path) -> None:
    with CloudProcess(tmp_path, *options) as cloud:
        edge = edges(cloud.url)
        edge.start(40)
        edge.go_on()
        assert cloud.page("/healthz") == (200, "ok\n") and cloud.page("/nothing")[0] == 404
        assert cloud.metric("sessions") == 1
        cycles = edge.decoder.cycles
        assert cloud.metric("drafted_tokens_total") == sum(cycle.drafted for cycle in cycles)
        assert cloud.metric("forward_seconds_count") == len(cycles) + 1  # the first token's
        assert cloud.metric("sent_bytes_total") > sum(cycle.bytes_down for cycle in cycles)
        edge.channel.close()
        wait_for(lambda: cloud.metric("sessions") == 0)


@pytest.fixture
def engine(tiny_target: Path, hello: Hello) -> Engine:
    """One in this process with few sessions and a short context."""
    return Engine(load_target(str(tiny_target), CPU, torch.float32), hello.vocabulary, 4, 64)


@contextlib.contextmanager
def in_process(cloud: Cloud) -> Iterator[str]:
    """A cloud on a thread of this process; its address."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    address = ""

    async def main() -> None:
        nonlocal address
        async with cloud.listening("127.0.0.1", 0) as server:
            address = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_an_engine_that_fails_is_asked_again(
    engine: Engine, edges: Edges, texts: dict[str, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it fails before or after it has answered others."""
    run, calls = engine.run, 0

    def failing(jobs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 5 == 0:
            run(jobs)
        if calls % 5 in (0, 3):
            raise RuntimeError("out of memory")
        return run(jobs)

    engine.run = failing  # type: ignore[method-assign]
    cloud = Cloud(engine, Limits(4))
    with in_process(cloud) as url:
        for kind in KINDS:
            assert edges(url, kind).text(20) == texts[kind][:20]
        calls = 0
        engine.run = lambda jobs: 1 / 0  # type: ignore
        with pytest.raises(CloudAway, match="the cloud failed at a forward; try again"):
            edges(url, patience=0.1).text(20)
        engine.run = run  # type: ignore[method-assign]
        assert edges(url).text(20) == texts["topk"][:20]
    assert "out of memory" in caplog.text and "ZeroDivisionError" in caplog.text
    assert "never retrieved" not in caplog.text


def test_an_edge_that_gives_a_connection_up_leaves_nothing_behind(
    engine: Engine, edges: Edges, texts: dict[str, list[int]]
) -> None:
    """No thread, and no session once it has said goodbye."""
    with in_process(Cloud(engine, Limits(4))) as url:
        before = threading.active_count()
        edge = edges(url)
        edge.start(20)
        for at in range(2, 20, 3):
            edge.go_on(at)
            edge.channel._drop()
        assert edge.go_on() == texts["topk"][:20]
        edge.channel.close()
        wait_for(lambda: threading.active_count() <= before + 1)  # that of the target
        wait_for(lambda: not engine.sessions)
        assert sorted(engine.free) == list(range(4))


@pytest.mark.parametrize("sampling", [{"temperature": float("nan")}, {"temperature": 1e-320}, {"top_p": float("nan")}])
def test_sampling_that_makes_no_sense_opens_no_session(
    engine: Engine, hello: Hello, sampling: dict[str, float]
) -> None:
    with pytest.raises(Refused, match=r"(temperature|top_p) is .*; expected"):
        engine.open(msgspec.structs.replace(hello, **sampling))
    assert not engine.sessions


def test_two_jobs_of_a_session_do_not_share_a_forward(engine: Engine, hello: Hello) -> None:
    """An edge that came back asks again while its first request still waits."""
    batches: list[list[int]] = []
    run = engine.run

    def watched(jobs: Any) -> Any:
        batches.append([job.session.slot for job in jobs])
        return run(jobs)

    engine.run = watched  # type: ignore[method-assign]
    sessions = [engine.open(replaced(hello, session=bytes([i] * 16))) for i in range(3)]
    jobs = [engine.job(session, Verify(1, 0, pack_ids(PROMPT, VOCAB), b"", "ids")) for session in sessions]

    async def ask() -> list[int | None]:
        batcher = Batcher(engine, Metrics())
        running = asyncio.create_task(batcher.run())
        answers = [asyncio.create_task(batcher.answer(jobs[i])) for i in (0, 1, 0, 2, 0, 1)]
        gone = asyncio.create_task(batcher.answer(jobs[2]))
        await asyncio.sleep(0)
        gone.cancel()
        done = await asyncio.gather(*answers)
        running.cancel()
        return [each.answer.token for each in done]

    answers = asyncio.run(ask())
    assert answers[0] == answers[2] == answers[4] and answers[1] == answers[5]
    slots = [session.slot for session in sessions]
    assert batches == [slots, slots[:2], slots[:1]]


def texts_of(ids: list[int]) -> bytes:
    return pack_ids(ids, VOCAB)


IDS = st.one_of(st.binary(max_size=12), st.lists(st.integers(0, VOCAB - 1), max_size=12).map(texts_of))
COUNTS = st.one_of(st.integers(0, 12), st.integers(0, 2**31 - 1))
WEIGHTS = st.one_of(st.binary(max_size=32), st.just(np.ones(VOCAB, "<f2").tobytes()))
CHANCES = st.one_of(st.binary(max_size=24), st.lists(st.floats(), max_size=8).map(pack_floats))
MODE = st.one_of(st.sampled_from(MODES), st.text(max_size=4))


def messages(hello: Hello) -> st.SearchStrategy[Any]:
    """Well-formed ones that say anything, many of them nearly sense."""
    return st.one_of(
        st.builds(
            Hello,
            st.sampled_from([VERSION] * 9 + [0]),
            st.just(hello.vocabulary),
            st.integers(0, 5).map(lambda i: bytes([i] * 16)),
            st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 100)),
            st.one_of(st.just(1.0), st.floats(0, 1, exclude_min=True)),
            st.integers(0, 2**63 - 1),
        ),
        st.builds(Verify, COUNTS, COUNTS, IDS, IDS, MODE, CHANCES, st.lists(st.builds(Sent, IDS, WEIGHTS), max_size=4)),
        st.builds(Plain, COUNTS, COUNTS, IDS, st.one_of(st.integers(1, 12), st.integers(1, 2**20)), IDS),
        st.integers(0, 4).flatmap(drafts),
        st.builds(Verdict, COUNTS, COUNTS, st.integers(-1, 99), st.floats(), st.floats(), st.binary(), st.text()),
        st.builds(Error, st.text(), st.text()),
    )


def drafts(n: int) -> st.SearchStrategy[Verify]:
    """Requests to judge ``n`` tokens that only lie about their distributions."""
    return st.builds(
        Verify,
        COUNTS,
        st.just(0),
        st.just(texts_of(PROMPT)),
        st.lists(st.integers(0, VOCAB - 1), min_size=n, max_size=n).map(texts_of),
        st.sampled_from(MODES),
        st.lists(st.floats(min_value=0, exclude_min=True), min_size=n, max_size=n).map(pack_floats),
        st.lists(st.builds(Sent, st.just(b""), WEIGHTS), min_size=n, max_size=n),
    )


ANY = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.fuzz
@given(data=st.data())
@settings(ANY)
def test_no_message_brings_the_engine_down(engine: Engine, hello: Hello, data: st.DataObject) -> None:
    session = None
    try:
        for message in data.draw(st.lists(messages(hello), min_size=1, max_size=5)):
            message = decode(encode(message))
            if isinstance(message, Hello):
                for old in list(engine.sessions.values())[:-2]:
                    engine.close(old)
                session = engine.open(message)
            elif session is not None and isinstance(message, (Verify, Plain)):
                job = engine.job(session, message)
                [answer] = engine.run([job])
                assert 0 <= answer.accepted <= len(job.draft)
                assert answer.token is None or 0 <= answer.token < VOCAB
                assert (answer.token is None) == (answer.logits is not None)
                decode(encode(answer.verdict(message.number, 0.0, 0.0)))
                if isinstance(message, Plain) and answer.token is not None:
                    engine.run([engine.going_on(job, answer.token)])
    except Refused as refused:
        assert refused.code in CODES and "\n" not in str(refused)


@pytest.mark.fuzz
@given(data=st.data())
@settings(ANY)
def test_no_message_brings_the_cloud_down(cloud: CloudProcess, hello: Hello, data: st.DataObject) -> None:
    frames = data.draw(
        st.lists(st.one_of(messages(hello).map(encode), st.binary(max_size=60), st.text(max_size=9)), max_size=2)
    )
    answers = say(cloud.url, encode(replaced(hello, session=b"h" * 16)), *frames, b"")
    *_, error, code = answers
    assert isinstance(error, Error) and error.code in CODES and error.code != "internal" and code == 1008


def test_the_cloud_is_still_right(cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]]) -> None:
    """After all of the above, and it has not complained."""
    for kind in KINDS:
        assert edges(cloud.url, kind).text(40) == texts[kind]
    assert cloud.said.count("\n") == 1 and cloud.process.is_alive()
    wait_for(lambda: cloud.metric("sessions") == 0)
