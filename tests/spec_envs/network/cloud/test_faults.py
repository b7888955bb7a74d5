"""Texts are correct whatever happens to connections, messages and the cloud."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cloud_process import CloudProcess, Fault, FaultProxy
from tests.support.edges import KINDS, PROMPT, Edges


def test_texts_are_reproducible_and_depend_on_seed(
    cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]]
) -> None:
    for kind in KINDS:
        assert edges(cloud.url, kind).text(40) == texts[kind]
        assert (edges(cloud.url, kind).text(40, 2) == texts[kind]) == (kind == "ids")


def test_texts_survive_killed_cloud(
    options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path
) -> None:
    with CloudProcess(tmp_path, *options) as cloud:
        started = {kind: edges(cloud.url, kind) for kind in KINDS}
        for edge in started.values():
            edge.start(40)
        for at in (10, 25):
            for edge in started.values():
                edge.advance(at)
            cloud.restart()
        assert {kind: edge.advance() for kind, edge in started.items()} == texts


def test_stream_survives_killed_cloud(
    options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path
) -> None:
    with CloudProcess(tmp_path, *options) as cloud, FaultProxy(cloud.url) as proxy:

        async def kill(number: int, source: str, frame: Any) -> list[Any] | None:
            if number != 12:
                return [frame]
            await asyncio.to_thread(cloud.restart)
            return None

        proxy.reset(kill)
        edge = edges(proxy.url)
        edge.start(40)
        assert edge.decoder.tokens + edge.decoder.verifier.decode(39, ()) == texts["plain"]
        assert proxy.passed > 40


def cut(at: int, delivered: bool) -> Fault:
    """Return a fault that loses the connection at a message, which is delivered or not."""

    async def fault(number: int, source: str, frame: Any) -> list[Any] | None:
        return [frame] if number < at or (delivered and number == at) or number > at + delivered else None

    return fault


def damaged(at: int, damage: Callable[[bytes], Any]) -> Fault:
    """Return a fault that replaces one message."""

    async def fault(number: int, source: str, frame: Any) -> list[Any] | None:
        return [damage(frame) if number == at else frame]

    return fault


def stalled(at: int) -> Fault:
    """Return a fault that withholds a message and everything after it."""

    async def fault(number: int, source: str, frame: Any) -> list[Any] | None:
        if number == at:
            await asyncio.Event().wait()
        return [frame]

    return fault


def assert_correct_with_fault_at_every_message(
    proxy: FaultProxy, edges: Edges, kind: str, expected: list[int], faults: Callable[[int], Fault], **others: Any
) -> None:
    """Assert that a text is correct with a fault at its first message, at its second one, and so on."""
    at, passed = 0, 1
    while at < passed:
        at += 1
        proxy.reset(faults(at))
        assert edges(proxy.url, kind, **others).text(len(expected)) == expected, at
        passed = proxy.passed
    assert at > 6


@pytest.mark.parametrize("kind", KINDS)
def test_texts_survive_connection_lost_at_any_message(
    cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]], kind: str
) -> None:
    expected = edges(cloud.url, kind).text(8)
    with FaultProxy(cloud.url) as proxy:
        assert_correct_with_fault_at_every_message(proxy, edges, kind, expected, lambda at: cut(at, False))
        if kind == "mixed":
            assert_correct_with_fault_at_every_message(proxy, edges, kind, expected, lambda at: cut(at, True))


def test_stalled_connection_is_reopened_after_patience(
    cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]]
) -> None:
    with FaultProxy(cloud.url) as proxy:
        proxy.reset(stalled(7))
        assert edges(proxy.url, timeout=2.5, patience=2.0).text(40) == texts["topk"]


DAMAGES: dict[str, Callable[[bytes], Any]] = {
    "truncated": lambda frame: frame[: len(frame) // 2],
    "empty": lambda frame: b"",
    "garbled": lambda frame: bytes(255 - byte for byte in frame),
    "text": lambda frame: "text",
}


@pytest.mark.parametrize("damage", [*DAMAGES, "stalled"])
def test_texts_survive_damaged_or_stalled_messages(cloud: CloudProcess, edges: Edges, damage: str) -> None:
    expected = edges(cloud.url, "mixed").text(6)
    with FaultProxy(cloud.url) as proxy:
        if damage == "stalled":
            assert_correct_with_fault_at_every_message(proxy, edges, "mixed", expected, stalled, timeout=0.2)
        else:
            assert_correct_with_fault_at_every_message(
                proxy, edges, "mixed", expected, lambda at: damaged(at, DAMAGES[damage])
            )


@pytest.mark.parametrize("kind", KINDS)
def test_texts_survive_delayed_or_repeated_messages(
    cloud: CloudProcess, edges: Edges, texts: dict[str, list[int]], kind: str
) -> None:
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

    with FaultProxy(cloud.url) as proxy:
        for fault in (delayed, twice, late):
            before.clear()
            proxy.reset(fault)
            edge = edges(proxy.url, kind, timeout=30.0)
            begin = time.monotonic()
            for count in (15, 40):  # two texts on one connection
                edge.start(count)
                assert edge.advance() == texts[kind][:count]
            edge.channel.close()
            assert time.monotonic() - begin < 30.0


@pytest.mark.parametrize("kind", KINDS)
def test_abandoned_streams_do_not_affect_later_texts(
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
        assert edge.advance() == texts[kind]
