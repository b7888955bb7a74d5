"""A cloud among clients that ask for too much, over real sockets to a separate process."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection, connect

from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.network.wire import (
    VERSION,
    Error,
    Hello,
    Plain,
    Verdict,
    Verify,
    Welcome,
    decode,
    encode,
    pack_ids,
    vocabulary_hash,
)
from tests.support.cloud_process import CloudProcess
from tests.support.edges import UPGRADE, wait_for
from tests.support.models.tiny import WORDS

VOCAB, CONTEXT = len(WORDS), 2048
REQUEST = b"GET / HTTP/1.1\r\n" + UPGRADE
SILENT = 1.5  # seconds until the clouds of these tests expect a greeting


@pytest.fixture(scope="module")
def options(tiny_target: Path) -> list[str]:
    target = ["--target", str(tiny_target), "--dtype", "float32", "--device", "cpu"]
    return [*target, "--greeting", str(SILENT)]


@pytest.fixture(scope="module")
def cloud(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudProcess]:
    """Yield the cloud of all tests that do not need their own."""
    with CloudProcess(tmp_path_factory.mktemp("crowd"), *options, "--sessions", "40") as process:
        yield process


@pytest.fixture(scope="module")
def vocabulary(tiny_target: Path) -> bytes:
    return vocabulary_hash(load_tokenizer(str(tiny_target)))


class Client:
    """A connection that sends given messages, and decodes greedily.

    Args:
        seed: seed of the session's key.
    """

    def __init__(self, cloud: CloudProcess, vocabulary: bytes, seed: int, changes: dict[str, Any] | None = None):
        self.connection: ClientConnection = connect(
            cloud.url, compression=None, proxy=None, max_size=None, ping_interval=None
        ).__enter__()
        fields = {"version": VERSION, "vocabulary": vocabulary, "session": seed.to_bytes(16, "big")}
        self.hello = Hello(**(fields | {"temperature": 0.0, "top_p": 1.0, "seed": 0} | (changes or {})))
        self.number = 0

    def greet(self) -> Any:
        return self.exchange(self.hello)

    def exchange(self, message: Any) -> Any:
        """Send a message and return the answer."""
        self.connection.send(encode(message))
        return decode(self.connection.recv(timeout=60))

    def verify(self, text: Sequence[int], draft: Sequence[int] = (), at: int = 0) -> Verdict:
        self.number += 1
        found = self.exchange(Verify(self.number, at, pack_ids(text, VOCAB), pack_ids(draft, VOCAB), "ids"))
        assert isinstance(found, Verdict), found
        return found

    def __enter__(self) -> Client:
        assert isinstance(self.greet(), Welcome)
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()


def connect_when_free(
    cloud: CloudProcess, vocabulary: bytes, seed: int, changes: dict[str, Any] | None = None
) -> Client:
    """Return a connection to a cloud that may first have to close another one to have room."""
    begin = time.monotonic()
    while True:
        with contextlib.suppress(InvalidStatus):
            return Client(cloud, vocabulary, seed, changes)
        assert time.monotonic() - begin < 30
        time.sleep(0.1)


def served(cloud: CloudProcess, vocabulary: bytes) -> int:
    """Return the token that an honest client gets, which tries for up to 30 s."""
    begin = time.monotonic()
    while True:
        errors = contextlib.suppress(OSError, EOFError, WebSocketException, AssertionError)
        with errors, Client(cloud, vocabulary, 10**6) as client:
            return client.verify([3, 4, 5]).token
        assert time.monotonic() - begin < 30
        time.sleep(0.1)


def rejections(cloud: CloudProcess, reason: str) -> float:
    lines = cloud.page("/metrics")[1].splitlines()
    return next(float(line.split()[1]) for line in lines if f'turned_away_total{{reason="{reason}"}}' in line)


def prompt(seed: int, length: int = CONTEXT - 1) -> list[int]:
    return np.random.default_rng(seed).integers(1, VOCAB, length).tolist()


def answer_of(client: Client) -> Any:
    """Return the answer to the last request, or None if it has not arrived."""
    with contextlib.suppress(TimeoutError):
        return decode(client.connection.recv(timeout=0))
    return None


def raw(cloud: CloudProcess) -> socket.socket:
    """Return a connection that became a WebSocket, and from which nothing is read."""
    found = socket.create_connection(("127.0.0.1", cloud.port), timeout=30)
    found.sendall(REQUEST + b"\r\n")
    assert found.recv(12) == b"HTTP/1.1 101"
    return found


def closed(connection: socket.socket) -> bool:
    """Return True if the connection is closed within 30 s; messages before that are discarded."""
    try:
        while connection.recv(2**16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def flood(connection: socket.socket, frame: bytes, count: int) -> None:
    """Send a frame repeatedly, until all are sent or the connection is closed."""
    block = frame * 1000
    with contextlib.suppress(OSError):
        for _ in range(count // 1000):
            connection.sendall(block)


def test_drafts_are_verified_between_chunks_of_prompts(options: list[str], vocabulary: bytes, tmp_path: Path) -> None:
    """While 8 prompts are read, another edge's drafts are verified between their chunks, long before the first
    prompt is answered. Its seconds count only its own forwards; the rest of its waiting time is reported as
    queueing, not as network."""
    chunk = 64
    with CloudProcess(tmp_path, *options, "--chunk", str(chunk)) as cloud, contextlib.ExitStack() as stack:
        honest = stack.enter_context(Client(cloud, vocabulary, 0))
        alone = honest.verify(prompt(9, 20), [1, 2, 3])
        others = [stack.enter_context(Client(cloud, vocabulary, i)) for i in range(1, 9)]
        for i, other in enumerate(others):
            other.connection.send(encode(Verify(1, 0, pack_ids(prompt(i), VOCAB), b"", "ids")))
        found: list[Verdict] = []
        first: list[Any] = []
        while not (first := [answer for answer in map(answer_of, others) if answer]):
            begin = time.perf_counter()
            found.append(honest.verify([], [1, 2, 3], at=20))
            assert found[-1].seconds + found[-1].queued <= time.perf_counter() - begin
        long = [*first, *(decode(other.connection.recv(timeout=60)) for other in others[len(first) :])]
        assert cloud.metric("batch_size_sum") >= 8 * (CONTEXT - 1) / chunk
    assert len(found) >= 10
    assert all((verdict.accepted, verdict.token) == (alone.accepted, alone.token) for verdict in found)
    own, theirs = (float(np.median([verdict.seconds for verdict in verdicts])) for verdicts in (found, long))
    assert own < theirs / 4
    assert float(np.median([verdict.queued for verdict in long])) > theirs  # because they wait for their turns


def test_prompt_of_closed_connection_is_not_read(options: list[str], vocabulary: bytes, tmp_path: Path) -> None:
    with CloudProcess(tmp_path, *options, "--chunk", "64", "--sessions", "2") as cloud:
        for seed in range(6):
            with Client(cloud, vocabulary, seed) as gone:
                gone.connection.send(encode(Verify(1, 0, pack_ids(prompt(seed), VOCAB), b"", "ids")))
        served(cloud, vocabulary)
        wait_for(lambda: cloud.metric("sessions") == 0)
        assert cloud.metric("emitted_tokens_total") < 6


def test_silent_connections_do_not_exclude_others(cloud: CloudProcess, vocabulary: bytes) -> None:
    """More connections than the cloud accepts send nothing, half a request, or half a message."""
    before = rejections(cloud, "greeting")
    begin = time.monotonic()
    silent = [socket.create_connection(("127.0.0.1", cloud.port), timeout=30) for _ in range(100)]
    for i, connection in enumerate(silent):
        with contextlib.suppress(OSError):
            connection.sendall([b"", REQUEST, REQUEST + b"\r\n", REQUEST + b"\r\n\x82\xfe\x00"][i % 4])
    assert served(cloud, vocabulary) < VOCAB
    assert all(closed(connection) for connection in silent)
    assert time.monotonic() - begin < 30  # well before the 300 s of --idle
    assert rejections(cloud, "greeting") > before
    for connection in silent:
        connection.close()


@pytest.mark.parametrize("opcode", [Opcode.PING, Opcode.PONG, Opcode.CONT])
def test_flood_of_empty_frames_closes_connection(cloud: CloudProcess, vocabulary: bytes, opcode: Opcode) -> None:
    greeting = Frame(Opcode.BINARY, encode(Client(cloud, vocabulary, 77).hello)).serialize(mask=True)
    connection, before = raw(cloud), rejections(cloud, "frames")
    connection.sendall(greeting)
    if opcode is Opcode.CONT:
        connection.sendall(Frame(Opcode.BINARY, b"", fin=False).serialize(mask=True))
    data = b"" if opcode is Opcode.CONT else bytes(125)
    frame = Frame(opcode, data, fin=opcode is not Opcode.CONT).serialize(mask=True)
    flood(connection, frame, 200_000)
    assert closed(connection)
    wait_for(lambda: rejections(cloud, "frames") == before + 1)
    connection.close()
    assert served(cloud, vocabulary) < VOCAB


def test_pings_of_working_edge_are_allowed(cloud: CloudProcess, vocabulary: bytes) -> None:
    """An edge measures the round trip after every answer."""
    with Client(cloud, vocabulary, 5) as client:
        client.verify([3, 4, 5])
        for _ in range(700):
            client.verify([], [1], at=3)
            client.connection.ping()
        assert client.connection.ping().wait(30)


def test_memory_for_clients_that_do_not_read_is_bounded(options: list[str], vocabulary: bytes, tmp_path: Path) -> None:
    """Repeated greetings, requests and long messages do not accumulate for a client that reads nothing."""
    with CloudProcess(tmp_path, *options, "--idle", "2", "--sessions", "8") as cloud:
        served(cloud, vocabulary)
        before = cloud.resident
        connections = [raw(cloud) for _ in range(8)]

        def send(i: int, connection: socket.socket) -> None:
            connection.settimeout(3)
            hello = Hello(VERSION, vocabulary, i.to_bytes(16, "big"), 0.0, 1.0, 0)
            first, plain = encode(hello), encode(Plain(1, 0, pack_ids([3], VOCAB), 1500, b""))
            long = encode(Verify(2, 0, bytes(3000), b"", "ids", bytes(100)))
            for each in (first, plain, *[long, first] * 20):
                connection.sendall(Frame(Opcode.BINARY, each).serialize(mask=True))
            flood(connection, Frame(Opcode.BINARY, first).serialize(mask=True), 10**6)

        threads = [threading.Thread(target=send, args=pair) for pair in enumerate(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cloud.resident - before < 32 * 1024, "memory in KiB"
        assert served(cloud, vocabulary) < VOCAB
        assert all(closed(connection) for connection in connections)
        for connection in connections:
            connection.close()


def test_long_messages_before_the_greeting_are_refused(cloud: CloudProcess, vocabulary: bytes) -> None:
    """Memory for long requests is granted only after the greeting."""
    with connect(cloud.url, compression=None, proxy=None) as connection:
        connection.send(bytes(5000))
        with pytest.raises(ConnectionClosed) as error:
            connection.recv(timeout=30)
    assert error.value.rcvd is not None and error.value.rcvd.code == 1009
    with Client(cloud, vocabulary, 6) as client:
        assert client.verify([3] * (CONTEXT - 1)).token < VOCAB


def test_compression_is_off(cloud: CloudProcess) -> None:
    with connect(cloud.url, compression="deflate", proxy=None) as connection:
        assert connection.response is not None
        assert "Sec-WebSocket-Extensions" not in connection.response.headers


def test_recovers_from_lack_of_file_descriptors(options: list[str], vocabulary: bytes, tmp_path: Path) -> None:
    """One line reports it, some connections are refused, and the cloud serves again afterwards."""
    with CloudProcess(tmp_path, *options, "--sessions", "200") as cloud:
        assert cloud.process.pid is not None
        open_now = len(list(Path(f"/proc/{cloud.process.pid}/fd").iterdir()))
        resource.prlimit(cloud.process.pid, resource.RLIMIT_NOFILE, (open_now + 10, open_now + 10))
        held = [socket.create_connection(("127.0.0.1", cloud.port), timeout=30) for _ in range(60)]
        time.sleep(2.5)  # long enough for another attempt
        for connection in held:
            connection.close()
        assert served(cloud, vocabulary) < VOCAB
        assert rejections(cloud, "files") > 0
        assert "no file descriptor is left" in cloud.printed and "Traceback" not in cloud.printed
        assert len(cloud.printed.splitlines()) <= 4 and len(cloud.printed) < 1000, cloud.printed


def test_sessions_per_address_are_limited(options: list[str], vocabulary: bytes, tmp_path: Path) -> None:
    with (
        CloudProcess(tmp_path, *options, "--sessions", "4", "--per-address", "2") as cloud,
        contextlib.ExitStack() as stack,
    ):
        one, two = (stack.enter_context(Client(cloud, vocabulary, i)) for i in (1, 2))
        token = one.verify([3, 4, 5]).token
        third = Client(cloud, vocabulary, 3)
        refused = third.greet()
        assert isinstance(refused, Error) and refused.code == "busy"
        assert refused.sentence == "all 2 sessions of your address are taken; try again later"
        two.connection.close_socket()  # its session is kept for a while, but may be taken over from the same address
        with Client(cloud, vocabulary, 4) as client:
            assert client.verify([3, 4, 5]).token == token
        assert one.verify([], at=3).token == token
        many = [socket.create_connection(("127.0.0.1", cloud.port), timeout=30) for _ in range(40)]
        assert any(closed(connection) for connection in many[-10:])
        assert one.verify([], at=3).token == token
        for connection in many:
            connection.close()
        assert cloud.printed.count("\n") <= 2, cloud.printed


@pytest.mark.parametrize("change", [{"vocabulary": b"x" * 16}, {"version": VERSION + 1}])
def test_refused_greeting_ends_no_session(
    options: list[str], vocabulary: bytes, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Disconnected edges, and the edge whose session the greeting names, keep their sessions."""
    with CloudProcess(tmp_path, *options, "--sessions", "1") as cloud:
        owner = Client(cloud, vocabulary, 1)
        owner.greet()
        owner.verify([3, 4, 5])
        for is_connected in (True, False):
            if not is_connected:
                owner.connection.close_socket()
            for seed in (2, 1):
                stranger = connect_when_free(cloud, vocabulary, seed, change)
                refused = stranger.greet()
                assert isinstance(refused, Error) and refused.code in change, refused
            if is_connected:
                owner.verify([], at=3)
        back = connect_when_free(cloud, vocabulary, 1)
        welcome = back.greet()
        assert isinstance(welcome, Welcome) and welcome.have == 4, welcome
        back.connection.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_cloud_cleanly(
    options: list[str], vocabulary: bytes, tmp_path: Path, number: signal.Signals
) -> None:
    """A second signal does not wait for texts; connections are told that the cloud is ending."""
    with CloudProcess(tmp_path, *options, "--grace", "600") as cloud:
        with Client(cloud, vocabulary, 1) as client:
            client.verify([3, 4, 5])
            assert cloud.process.pid is not None
            os.kill(cloud.process.pid, number)
            wait_for(lambda: cloud.page("/healthz")[0] == 503)
            client.verify([], at=3)
            os.kill(cloud.process.pid, number)
            with pytest.raises(ConnectionClosed) as error:
                client.connection.recv(timeout=30)
            assert error.value.rcvd is not None and error.value.rcvd.code == 1001
        assert cloud.end(30) == 0
        assert cloud.printed.count("\n") == 1, cloud.printed
