"""The edge reports every invalid answer of a cloud in one sentence, and prints no control characters."""

from __future__ import annotations

import http.server
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from spec_envs.decoding.sampling import Proposal
from spec_envs.network.edge.answers import SHOWN, one_line
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.websocket import CloudUnavailable, SocketChannel
from spec_envs.network.wire import Error, Hello, Message, Plain, Tokens, Verdict, Verify, Welcome, decode, encode

VOCAB, KEY = 16, bytes(16)
WELCOME = Welcome(0, 64, VOCAB)
ESCAPES = "\033]0;owned\007\033[2J\x9b31m\u202e\r\nback\b\x7f\u2028"
Answers = Callable[[Any], list[Any] | None]


@contextmanager
def cloud(answers: Answers, close: tuple[int, str] | None = None) -> Iterator[str]:
    """Yield the address of a cloud that answers every message with these frames, and closes the connection at None."""

    def talk(connection: ServerConnection) -> None:
        try:
            for frame in connection:
                found = answers(decode(frame))
                if found is None:
                    return connection.close(*close) if close else connection.close_socket()
                for each in found:
                    connection.send(each if isinstance(each, (bytes, str)) else encode(each))
        except ConnectionClosed:
            pass

    with serve(talk, "127.0.0.1", 0, compression=None, close_timeout=0.1) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()


def edge(url: str, mode: str = "topk", temperature: float = 1.0, patience: float = 0.3) -> RemoteVerifier:
    verifier = RemoteVerifier(SocketChannel(url, patience=patience), KEY, VOCAB, 64, temperature)
    verifier.mode = mode
    return verifier


def emitted_tokens(verifier: RemoteVerifier, draft: list[int]) -> list[int]:
    """Return the tokens that are emitted for a draft after a prompt."""
    try:
        first = verifier.start([1, 2, 3], 20, np.random.default_rng(0))
        chain = np.array(draft)
        proposals = [Proposal(np.arange(4), np.ones(4)) for _ in draft]
        verdict = verifier.verify(chain, np.arange(len(chain)) - 1, np.arange(len(chain)), proposals)
        return [first, *chain[: len(verdict.path)].tolist(), verdict.token]
    finally:
        verifier.close()


def honest(request: Any) -> list[Any]:
    """Return the answer of an honest cloud, which accepts every draft."""
    if isinstance(request, Hello):
        return [WELCOME]
    if isinstance(request, Plain):
        numbers = range(request.count)
        return [Tokens(request.number, 7, i == request.count - 1, 0.0, 0.0, i) for i in numbers]
    assert isinstance(request, Verify)
    return [Verdict(request.number, len(request.draft) // 2, 5, 0.0, 0.0)]


def lying(lie: Callable[[Verify], list[Any] | None]) -> Answers:
    """Return the answers of a cloud that is honest until it gets a draft."""
    return lambda request: lie(request) if isinstance(request, Verify) and request.draft else honest(request)


def raw(*fields: Any) -> bytes:
    """Return an encoded message whose fields are not checked."""
    return msgspec.msgpack.encode(fields)


def test_answers_of_honest_cloud_are_used() -> None:
    with cloud(honest) as url:
        assert emitted_tokens(edge(url), [1, 2, 3]) == [5, 1, 2, 3, 5]
        verifier = edge(url)
        verifier.start([1], 20, np.random.default_rng(0))
        assert verifier.decode(4, ()) == [7] * 4
        assert verifier.decode(4, ()) == [7] * 4
        verifier.close()


def of(number: int, accepted: int = 0, token: int = 5, **others: Any) -> Verdict:
    return Verdict(number, accepted, token, 0.0, 0.0, **others)


LOGITS = np.zeros(VOCAB, "<f4")
LIES: dict[str, Callable[[Verify], list[Any] | None]] = {
    "accepted 4 tokens of a draft of 3": lambda r: [of(r.number, 4)],
    "accepted 2147483647 tokens of a draft of 3": lambda r: [of(r.number, 2**31 - 1)],
    "token 16; the vocabulary has 16": lambda r: [of(r.number, 0, VOCAB)],
    "verdict has no token": lambda r: [of(r.number, 0, -1)],
    "bytes are not a message of version 1": lambda r: [raw(4, r.number, 0, 2**62, 0.0, 0.0)],
    r"not a message of version 1: .*>= 0": lambda r: [raw(4, r.number, -1, 3, 0.0, 0.0)],
    r"not a message of version 1: .*>= -1": lambda r: [raw(4, r.number, 0, -2, 0.0, 0.0)],
    r"not a message of version 1: Expected .*0.0": lambda r: [raw(4, r.number, 0, 3, -1.0, 0.0)],
    r"not a message of version 1: Expected .*4\]": lambda r: [raw(4, r.number, 0, 3, math.nan, 0.0)],
    r"not a message of version 1: Expected `array`": lambda r: [raw(4, r.number, 0, 3, 0.0, 0.0, b"", "", "more", 1)],
    "not a message of version 1: Expected `int`": lambda r: [raw(4, r.number, 0, [1] * 1000, 0.0, 0.0)],
    "received a text frame": lambda r: ["text"],
    "received Hello": lambda r: [Hello(1, KEY, KEY, 0.0, 1.0, 0)],
    "received Tokens": lambda r: [Tokens(r.number, 3, True, 0.0, 0.0, 0)],
    "timed out|does not answer": lambda r: [],
    "does not answer": lambda r: [of(r.number + 1), of(r.number - 1)],
    "no close frame|does not answer ": lambda r: None,
    r"refused: back owned": lambda r: [Error("limit", f"back owned {ESCAPES}")],
    r"does not answer \(x{300}…\)": lambda r: [Error("busy", "x" * 10**5)],
    r"does not answer \(\[2J later\)": lambda r: [Error("busy", "\033[2J later")],
}


@pytest.mark.parametrize("sentence", LIES)
def test_invalid_answer_is_reported_in_one_sentence(sentence: str, capfd: pytest.CaptureFixture[str]) -> None:
    with cloud(lying(LIES[sentence])) as url, pytest.raises((ValueError, CloudUnavailable), match=sentence) as error:
        emitted_tokens(edge(url), [1, 2, 3])
    reported = str(error.value)
    assert reported.isprintable() and len(reported) < 1000 and "the cloud" in reported
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("verdict", "sentence"),
    [
        ({"logits": LOGITS.tobytes()[1:], "dtype": "float32"}, "received 63 bytes of 'float32' logits"),
        ({"logits": LOGITS.tobytes(), "dtype": "int32"}, "64 bytes of 'int32' logits"),
        ({"logits": (LOGITS + np.nan).tobytes(), "dtype": "float32"}, "logits that are not finite"),
        ({"logits": (LOGITS - np.inf).tobytes(), "dtype": "float32"}, "logits that are not finite"),
        ({"accepted": 3, "logits": LOGITS.tobytes(), "dtype": "float32"}, "verdict has no token"),
        ({}, "0 bytes of '' logits"),
    ],
)
def test_invalid_logits_are_refused(verdict: dict[str, Any], sentence: str) -> None:
    lie = lying(lambda r: [of(r.number, **{"token": -1} | verdict)])
    with cloud(lie) as url, pytest.raises(ValueError, match=sentence):
        emitted_tokens(edge(url, "scalar"), [1, 2, 3])


@pytest.mark.parametrize(
    ("welcome", "sentence"),
    [
        (Welcome(0, 64, VOCAB + 1), "the cloud's target has 17 token ids and the edge's 16; give both the same target"),
        (Welcome(0, 64, 2**31 - 1), "the cloud's target has 2147483647 token ids"),
        (Welcome(0, 0, VOCAB), "the cloud takes texts of 0 tokens"),
        (Welcome(0, 8, VOCAB), "the cloud takes texts of up to 8"),
        (Welcome(5, 64, VOCAB), "the cloud has 5 tokens of a text of 0"),
        (raw(2, -1, 64, VOCAB), "not a message of version 1"),
        (raw(2, 0, 2**40, VOCAB), "not a message of version 1"),
        (raw(2, 0, 64), "not a message of version 1"),
        (raw(2, 0, 64, VOCAB, "version 2"), "not a message of version 1"),
        (Error("version", f"the edge speaks {ESCAPES} another"), "refused: the edge speaks .*another"),
        (Error("\033[31m", "odd"), "refused: odd"),
    ],
)
def test_invalid_welcome_is_refused(welcome: Any, sentence: str) -> None:
    with (
        cloud(lambda request: [welcome]) as url,
        pytest.raises((ValueError, CloudUnavailable), match=sentence) as error,
    ):
        emitted_tokens(edge(url), [1, 2, 3])
    assert str(error.value).isprintable()


def test_changed_target_after_reconnecting_is_refused() -> None:
    welcomes = iter([WELCOME, Welcome(0, 64, VOCAB + 1)])

    def answers(request: Any) -> list[Any] | None:
        if isinstance(request, Hello):
            return [next(welcomes)]
        return None if request.draft else honest(request)

    with cloud(answers) as url, pytest.raises(ValueError, match="has 17 token ids and the edge's 16"):
        emitted_tokens(edge(url, patience=5.0), [1, 2, 3])


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (lambda r: [Tokens(r.number, 7, True, 0.0, 0.0, 0)], r"ended a stream too early \(token 1 of 4\)"),
        (
            lambda r: [Tokens(r.number, 7, False, 0.0, 0.0, i) for i in range(9)],
            r"did not end a stream \(token 4 of 4\)",
        ),
        (lambda r: [Tokens(r.number, 3, False, 0.0, 0.0, 0)], r"did not end a stream \(token 1 of 4\)"),
        (lambda r: [Tokens(r.number, VOCAB, False, 0.0, 0.0, 0)], "token 16; the vocabulary has 16"),
        (lambda r: [Tokens(r.number, 7, False, 0.0, 0.0, 3)], "received token 3 of a stream; expected 0"),
    ],
)
def test_invalid_streams_are_refused(tokens: Callable[[Plain], list[Any]], sentence: str) -> None:
    with cloud(lambda request: tokens(request) if isinstance(request, Plain) else honest(request)) as url:
        verifier = edge(url)
        verifier.start([1], 20, np.random.default_rng(0))
        with pytest.raises((ValueError, CloudUnavailable), match=sentence):
            verifier.decode(4, (3,))
        verifier.close()


def test_endless_unrelated_answers_end_with_cloud_unavailable() -> None:
    """Answers to requests that were not made do not keep an edge waiting."""
    lie = lying(lambda r: [of(r.number + 1)] * 20_000)
    with cloud(lie) as url, pytest.raises(CloudUnavailable, match="does not answer"):
        emitted_tokens(edge(url), [1, 2, 3])


def test_reason_of_closing_is_printable() -> None:
    sentence, close = r"policy violation\) \[31m no", (1008, "\033[31m no")
    with cloud(lambda request: None, close) as url, pytest.raises(CloudUnavailable, match=sentence) as error:
        emitted_tokens(edge(url), [1, 2, 3])
    assert str(error.value).isprintable()


@contextmanager
def web(status: int, reason: str = "", **headers: str) -> Iterator[tuple[int, list[dict[str, str]]]]:
    """Yield the port of a web server that gives every request the same answer, and the headers of its requests."""
    asked: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(dict(self.headers))
            self.send_response(status, reason)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1], asked
        server.shutdown()


def test_redirects_are_not_followed() -> None:
    with web(200) as (other, asked), web(302, Location=f"ws://127.0.0.1:{other}/") as (port, first):
        channel = SocketChannel(f"ws://127.0.0.1:{port}", patience=0.3, token="a-secret-token-of-mine")
        verifier = RemoteVerifier(channel, KEY, VOCAB, 64)
        with pytest.raises(CloudUnavailable, match="HTTP 302") as error:
            emitted_tokens(verifier, [1])
        assert first and not asked and str(error.value).isprintable()
        assert "a-secret-token" not in str(error.value)


@pytest.mark.parametrize("status", [200, 204, 400, 403, 404, 418, 500, 503])
def test_server_that_is_no_cloud_is_reported(status: int) -> None:
    with web(status, "\033[31mowned") as (port, _), pytest.raises(CloudUnavailable, match="does not answer") as error:
        emitted_tokens(edge(f"ws://127.0.0.1:{port}"), [1])
    assert str(error.value).isprintable()


@given(st.text(max_size=2 * SHOWN))
def test_one_line_has_printable_characters_only(text: str) -> None:
    clean = one_line(text)
    assert clean.isprintable() and len(clean) <= SHOWN + 1
    assert one_line(clean) == clean
    if text.isprintable() and len(text) <= SHOWN:
        assert clean.split() == text.split()


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=20)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
SHAPED = st.lists(ANY, max_size=8).flatmap(lambda rest: st.integers(1, 7).map(lambda kind: [kind, *rest]))
VERDICTS = st.tuples(
    st.integers(2**16, 2**16 + 4),
    st.integers(0, 5),
    st.integers(-1, 20),
    st.floats(),
    st.floats(),
    st.binary(max_size=64),
).map(lambda fields: [4, *fields, "float32"])
FRAMES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=9),
    st.one_of(ANY, SHAPED, VERDICTS).map(msgspec.msgpack.encode),
    st.tuples(st.binary(min_size=1, max_size=3), st.integers(0, 20)).map(
        lambda pair: (frame := encode(of(2**16 + 2, 1)))[: pair[1]] + pair[0] + frame[pair[1] + 1 :]
    ),
)


@pytest.fixture(scope="module")
def scripted_cloud() -> Iterator[tuple[str, list[list[Any]]]]:
    """Yield the address of a cloud, and the lists of frames that answer a greeting and a draft."""
    script: list[list[Any]] = [[], []]

    def answers(request: Any) -> list[Any] | None:
        if isinstance(request, Hello):
            return script[0] or [WELCOME]
        return script[1] or None if isinstance(request, Verify) and request.draft else honest(request)

    with cloud(answers) as url:
        yield url, script


@pytest.mark.fuzz
@settings(max_examples=max(1, settings.default.max_examples // 2))
@given(
    greeting=st.lists(FRAMES, max_size=1), answer=st.lists(FRAMES, max_size=3), mode=st.sampled_from(["topk", "scalar"])
)
def test_edge_survives_any_frame(
    scripted_cloud: tuple[str, list[list[Any]]], greeting: list[Any], answer: list[Any], mode: str
) -> None:
    """The edge generates a text, or ends with one sentence."""
    url, script = scripted_cloud
    script[:] = greeting, answer
    try:
        tokens = emitted_tokens(edge(url, mode, patience=0.05), [1, 2, 3])
    except (ValueError, CloudUnavailable) as error:
        assert str(error).isprintable() and len(str(error)) < 1000
    else:
        assert all(0 <= token < VOCAB for token in tokens)
    script[:] = [], [of(2**16 + 2, 3)]
    assert emitted_tokens(edge(url, patience=5.0), [1, 2, 3]) == [5, 1, 2, 3, 5]


def kinds() -> list[type[Message]]:
    """Return all types of messages, so that new ones are tested too."""
    return [Hello, Welcome, Verify, Verdict, Plain, Tokens, Error]


def test_messages_with_extra_fields_are_refused() -> None:
    for number, kind in enumerate(kinds(), 1):
        fields = [0] * len(kind.__struct_fields__)
        with pytest.raises(ValueError, match="not a message of version 1"):
            decode(raw(number, *fields, *[0] * 5))
