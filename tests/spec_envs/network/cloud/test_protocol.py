"""Data that is no message of the protocol is refused, and engine and cloud keep running."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.sync.client import connect

from spec_envs.network.cloud.engine import Engine
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
)
from tests.support.cloud_process import CloudProcess
from tests.support.edges import KINDS, PROMPT, UPGRADE, VOCAB, Edges, replaced, send_frames, wait_for


def test_invalid_messages_are_refused(
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
        *answers, error, closed = send_frames(cloud.url, *frames)
        assert (error.code, closed) == (code, 1008), (frames, error)
        assert error.sentence and "\n" not in error.sentence
        assert all(isinstance(answer, Welcome) for answer in answers)
    assert send_frames(cloud.url, bytes(5000)) == [1009]
    assert send_frames(cloud.url, first, bytes(5000))[-1] == 1009
    assert edges(cloud.url).text(40) == texts["topk"]


def test_invalid_http_and_edges_that_do_not_read(
    cloud: CloudProcess, edges: Edges, hello: Hello, texts: dict[str, list[int]]
) -> None:
    """Edges that do not read are disconnected, otherwise their connection would last for ever."""
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
        half.socket.sendall(b"\x82\xfe\x00")  # the start of a frame that is never completed
        half.socket.shutdown(socket.SHUT_WR)
    raw = socket.create_connection(address)
    raw.settimeout(1.0)
    raw.sendall(b"GET / HTTP/1.1\r\n" + UPGRADE + b"\r\n")
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


def texts_of(ids: list[int]) -> bytes:
    return pack_ids(ids, VOCAB)


IDS = st.one_of(st.binary(max_size=12), st.lists(st.integers(0, VOCAB - 1), max_size=12).map(texts_of))
COUNTS = st.one_of(st.integers(0, 12), st.integers(0, 2**31 - 1))
WEIGHTS = st.one_of(st.binary(max_size=32), st.just(np.ones(VOCAB, "<f2").tobytes()))
CHANCES = st.one_of(st.binary(max_size=24), st.lists(st.floats(), max_size=8).map(pack_floats))
MODE = st.one_of(st.sampled_from(MODES), st.text(max_size=4))


def messages(hello: Hello) -> st.SearchStrategy[Any]:
    """Return well-formed messages with arbitrary content, much of it nearly valid."""
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
    """Return requests to verify ``n`` tokens whose only errors are in their distributions."""
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
def test_engine_survives_any_message(engine: Engine, hello: Hello, data: st.DataObject) -> None:
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
                    engine.run([engine.following(job, answer.token)])
    except Refused as refused:
        assert refused.code in CODES and "\n" not in str(refused)


@pytest.mark.fuzz
@given(data=st.data())
@settings(ANY)
def test_cloud_survives_any_message(cloud: CloudProcess, hello: Hello, data: st.DataObject) -> None:
    frames = data.draw(
        st.lists(st.one_of(messages(hello).map(encode), st.binary(max_size=60), st.text(max_size=9)), max_size=2)
    )
    answers = send_frames(cloud.url, encode(replaced(hello, session=b"h" * 16)), *frames, b"")
    *_, error, code = answers
    assert isinstance(error, Error) and error.code in CODES and error.code != "internal" and code == 1008


def test_texts_are_correct_after_invalid_messages(
    cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]]
) -> None:
    """The cloud answers correctly after all tests above, and has logged nothing more."""
    for kind in KINDS:
        assert edges(cloud.url, kind).text(40) == texts[kind]
    assert cloud.printed.count("\n") == 1 and cloud.process.is_alive()
    wait_for(lambda: cloud.metric("sessions") == 0)
