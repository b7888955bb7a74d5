"""Texts are right whatever happens to connections, messages and the cloud."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cloud_process import CloudProcess, Fault, Meddler
from tests.support.edges import KINDS, PROMPT, Edges


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
    """Return a fault that loses the connection at a message, which may still come through."""

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


def everywhere(
    between: Meddler, edges: Edges, kind: str, expected: list[int], faults: Callable[[int], Fault], **others: Any
) -> None:
    """Check that a text is right with a fault at its first message, at its second one, and so on."""
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
