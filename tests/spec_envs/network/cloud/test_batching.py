"""The order in which a cloud serves requests, and that answers do not depend on it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_envs.network.cloud.batching import Answered, Batcher
from spec_envs.network.cloud.engine import SHORT, Answer, Engine, Job
from spec_envs.network.cloud.metrics import Metrics
from spec_envs.network.wire import VERSION, Hello, Plain, Refused, Verify, pack_ids
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.pairs import CONFIGS, pair

KEY = bytes(16)


class Ledger:
    """An engine that records whose rows it reads, and computes nothing.

    Args:
        chunk: rows of a forward.
        bad_slots: slots whose jobs make it fail.
    """

    def __init__(self, chunk: int = 64, bad_slots: Sequence[int] = ()):
        self.chunk, self.bad_slots = chunk, bad_slots
        self.remaining: dict[int, int] = {}
        self.forwards: list[list[int]] = []
        self.chunks: list[int] = []  # slots of the chunks of long requests

    def job(self, slot: int, rows: int) -> Job:
        self.remaining[slot] = rows
        return Job(SimpleNamespace(slot=slot), np.zeros(1, np.int64), np.zeros(0, np.int64), "ids")  # type: ignore[arg-type]

    def rows(self, job: Job) -> int:
        return self.remaining[job.session.slot]

    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        slots = [job.session.slot for job in jobs]
        self.forwards.append(slots)
        assert max(map(self.rows, jobs)) * len(jobs) <= max(self.chunk, SHORT) or len(jobs) == 1
        self.chunks += [slot for slot in slots if self.remaining[slot] > SHORT]
        if set(slots) & set(self.bad_slots):
            raise RuntimeError("out of memory")
        return [Answer(0, slot) for slot in slots]

    def read(self, job: Job) -> None:
        self.forwards.append([job.session.slot])
        self.chunks.append(job.session.slot)
        if job.session.slot in self.bad_slots:
            raise RuntimeError("out of memory")
        self.remaining[job.session.slot] -= self.chunk


def answered(engine: Any, asked: Sequence[tuple[int, int, str]], batching: bool = True) -> list[Any]:
    """Return the answers to jobs (slot, rows, owner) that all wait at the same time; of refusals, their codes."""

    async def ask() -> list[Any]:
        batcher = Batcher(engine, Metrics(), batching)
        jobs = [(engine.job(slot, rows), owner) for slot, rows, owner in asked]
        waiting = [asyncio.create_task(batcher.answer(*each)) for each in jobs]
        await asyncio.sleep(0)
        running = asyncio.create_task(batcher.run())
        found = await asyncio.gather(*waiting, return_exceptions=True)
        running.cancel()
        return [each.code if isinstance(each, Refused) else each for each in found]

    return asyncio.run(ask())


def test_short_requests_come_first_and_owners_alternate() -> None:
    """Every owner gets as many chunks as any other, however many prompts it sends."""
    engine = Ledger()
    crowd = [(slot, 640, "crowd") for slot in range(5)]
    answered(engine, [*crowd, (5, 320, "one"), (6, 5, "short"), (7, 3, "other")])
    assert engine.forwards[0] == [6, 7]
    assert engine.chunks[:8] == [0, 5, 1, 5, 2, 5, 3, 5]  # the rest of the fifth chunk is a short request
    assert engine.chunks[8:] == [4, *[0, 1, 2, 3, 4] * 8]


def test_short_requests_are_answered_between_chunks() -> None:
    engine, order = Ledger(), []

    async def ask() -> None:
        batcher = Batcher(engine, Metrics())  # type: ignore[arg-type]

        async def long(slot: int) -> None:
            await batcher.answer(engine.job(slot, 6400), "crowd")
            order.append("long")

        async def short() -> None:
            for _ in range(40):
                await batcher.answer(engine.job(99, 5), "short")
            order.append("40 short ones")

        running = asyncio.create_task(batcher.run())
        await asyncio.gather(short(), *(long(slot) for slot in range(3)))
        running.cancel()

    asyncio.run(ask())
    assert order == ["40 short ones", "long", "long", "long"]
    at = [i for i, slots in enumerate(engine.forwards) if 99 in slots]
    assert max(np.diff(at)) <= 2


def test_owner_with_many_sessions_does_not_delay_another() -> None:
    """The padded rows of a forward are bounded, and owners alternate."""
    engine = Ledger(chunk=128)
    found = answered(engine, [*((slot, 60, "crowd") for slot in range(20)), (20, 5, "one")])
    assert all(isinstance(done, Answered) for done in found)
    assert next(i for i, slots in enumerate(engine.forwards) if 20 in slots) <= 1
    assert max(map(len, engine.forwards)) == 2


def test_without_batching_each_request_has_its_own_forward() -> None:
    engine = Ledger()
    answered(engine, [(0, 5, "a"), (1, 5, "b"), (2, 200, "c")], batching=False)
    assert engine.forwards == [[0], [1], [2], [2], [2], [2]]


@pytest.mark.parametrize("rows", [5, 640])
def test_failing_request_does_not_affect_others(rows: int, caplog: pytest.LogCaptureFixture) -> None:
    """Only the request that makes the engine fail is refused, and the log has one line about it."""
    engine = Ledger(chunk=640, bad_slots=[1, 3])
    found = answered(engine, [(slot, rows, "all") for slot in range(5)])
    assert [each if isinstance(each, str) else each.answer.token for each in found] == [0, "internal", 2, "internal", 4]
    assert caplog.text.count("a forward failed") == 1


def test_seconds_count_own_forwards_only() -> None:
    class Slow(Ledger):
        def read(self, job: Job) -> None:
            super().read(job)
            time.sleep(0.02)

    engine = Slow()
    short, *long = answered(engine, [(9, 5, "short"), *((slot, 640, "crowd") for slot in range(3))])
    assert short.seconds < min(done.seconds for done in long)
    assert all(done.queued > done.seconds for done in long)  # the time in which the two others were read


@pytest.mark.fuzz
@given(
    asked=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 700), st.sampled_from("abc")), min_size=1, max_size=12),
    chunk=st.integers(64, 200),
)
def test_all_requests_are_answered_and_owners_get_equal_turns(asked: list[tuple[int, int, str]], chunk: int) -> None:
    jobs = [(slot, rows, owner) for slot, (_, rows, owner) in enumerate(asked)]
    engine = Ledger(chunk)
    found = answered(engine, jobs)
    assert [done.answer.token for done in found] == [slot for slot, _, _ in jobs]
    assert sum(map(len, engine.forwards)) >= len(jobs)
    turns = [jobs[slot][2] for slot in engine.chunks]
    for one, other in itertools.permutations(set(turns), 2):
        both = turns[: min(len(turns) - turns[::-1].index(owner) for owner in (one, other))]
        assert abs(both.count(one) - both.count(other)) <= 2  # the end of a long request is a short one; and one turn


@pytest.fixture(scope="module")
def target() -> Any:
    """Return a random int8 model, in which a row's result does not depend on its batch."""
    if WITHOUT_KERNELS:
        pytest.skip("the kernels cannot be built here")
    return pair(CONFIGS["llama"])[0]


def hello(seed: int, temperature: float) -> Hello:
    return Hello(VERSION, KEY, seed.to_bytes(16, "big"), temperature, 1.0, seed)


@pytest.mark.fuzz
@settings(max_examples=max(1, settings.default.max_examples // 3))
@given(data=st.data(), chunk=st.integers(1, 200), temperature=st.sampled_from([0.0, 1.0]))
def test_answers_do_not_depend_on_chunks_and_order(
    target: Any, data: st.DataObject, chunk: int, temperature: float
) -> None:
    """Texts of any lengths, read in any chunks and order, get the answers and caches of each text alone."""
    vocab = target.shape.vocab
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    texts = [np.random.default_rng(i).integers(0, vocab, n).tolist() for i, n in enumerate(lengths)]

    def engine(sessions: int, rows: int) -> Engine:
        return Engine(target, KEY, sessions, 400, rows)

    crowd = engine(len(texts), chunk)
    sessions = [crowd.open(hello(i, temperature)) for i in range(len(texts))]
    jobs = [crowd.job(s, Verify(1, 0, pack_ids(t, vocab), b"", "ids")) for s, t in zip(sessions, texts, strict=True)]
    for _ in range(data.draw(st.integers(0, 6))):
        job = jobs[data.draw(st.integers(0, len(jobs) - 1))]
        if crowd.rows(job) > chunk:
            crowd.read(job)
            assert job.session.tokens.tolist() == job.text[: len(job.session.tokens)].tolist()
    answers = crowd.run(jobs)
    for session, text, answer in zip(sessions, texts, answers, strict=True):
        alone = engine(1, 1000)
        own = alone.open(session.hello)
        [expected] = alone.run([alone.job(own, Verify(1, 0, pack_ids(text, vocab), b"", "ids"))])
        assert answer == expected and session.tokens.tolist() == [*text, expected.token]
        rows = slice(0, len(text))
        assert torch.equal(crowd.slots.data[:, :, session.slot, :, rows], alone.slots.data[:, :, own.slot, :, rows])


def test_repeated_request_reuses_rows_of_the_text(target: Any) -> None:
    """Two simultaneous requests of a session do not use each other's rows."""
    engine, vocab = Engine(target, KEY, 1, 300, 64), target.shape.vocab
    text = np.random.default_rng(0).integers(0, vocab, 200).tolist()
    session = engine.open(hello(0, 0.0))
    first = engine.job(session, Verify(1, 0, pack_ids(text, vocab), b"", "ids"))
    engine.read(first)
    again = engine.job(session, Verify(2, 0, pack_ids(text, vocab), b"", "ids"))
    assert engine.rows(again) == engine.rows(first) == 200 - 64
    other = engine.job(session, Plain(3, 32, pack_ids(text[100:], vocab), 4, b""))
    [expected] = engine.run([again])
    [changed] = engine.run([other])
    alone = Engine(target, KEY, 1, 300)
    own = alone.open(hello(0, 0.0))
    assert [changed] == alone.run([alone.job(own, Verify(1, 0, pack_ids(text[:32] + text[100:], vocab), b"", "ids"))])
    assert [expected] == alone.run([alone.job(own, Verify(1, 0, pack_ids(text, vocab), b"", "ids"))])
