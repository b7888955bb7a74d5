"""Sessions and forwards of a cloud in this process."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import msgspec
import pytest

from spec_envs.network.cloud.batching import Batcher
from spec_envs.network.cloud.engine import Engine
from spec_envs.network.cloud.metrics import Metrics
from spec_envs.network.cloud.server import Cloud, Limits
from spec_envs.network.websocket import CloudUnavailable
from spec_envs.network.wire import (
    Hello,
    Refused,
    Verify,
    pack_ids,
)
from tests.support.edges import KINDS, PROMPT, VOCAB, Edges, in_process, replaced, wait_for


def test_failed_forward_is_repeated(
    engine: Engine, edges: Edges, texts: dict[str, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """The engine may fail before or after it has answered other requests."""
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
        with pytest.raises(CloudUnavailable, match="the cloud failed at a forward; try again"):
            edges(url, patience=0.1).text(20)
        engine.run = run  # type: ignore[method-assign]
        assert edges(url).text(20) == texts["topk"][:20]
    assert "out of memory" in caplog.text and "ZeroDivisionError" in caplog.text
    assert "never retrieved" not in caplog.text


def test_dropped_connections_leave_no_thread_or_session(
    engine: Engine, edges: Edges, texts: dict[str, list[int]]
) -> None:
    """No thread remains, and no session once the edge has closed its channel."""
    with in_process(Cloud(engine, Limits(4))) as url:
        before = threading.active_count()
        edge = edges(url)
        edge.start(20)
        for at in range(2, 20, 3):
            edge.advance(at)
            edge.channel._drop()
        assert edge.advance() == texts["topk"][:20]
        edge.channel.close()
        wait_for(lambda: threading.active_count() <= before + 1)  # the thread of the target
        wait_for(lambda: not engine.sessions)
        assert sorted(engine.free) == list(range(4))


@pytest.mark.parametrize("sampling", [{"temperature": float("nan")}, {"temperature": 1e-320}, {"top_p": float("nan")}])
def test_invalid_sampling_opens_no_session(engine: Engine, hello: Hello, sampling: dict[str, float]) -> None:
    with pytest.raises(Refused, match=r"(temperature|top_p) is .*; expected"):
        engine.open(msgspec.structs.replace(hello, **sampling))
    assert not engine.sessions


def test_jobs_of_one_session_do_not_share_a_forward(engine: Engine, hello: Hello) -> None:
    """An edge that reconnected asks again while its first request still waits."""
    batches: list[list[int]] = []
    run = engine.run

    def recorded(jobs: Any) -> Any:
        batches.append([job.session.slot for job in jobs])
        return run(jobs)

    engine.run = recorded  # type: ignore[method-assign]
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
