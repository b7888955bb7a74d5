"""The scheduler of a cloud: it decides which requests are served next, and which of them share a forward."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import queue
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from spec_envs.network.cloud.engine import SHORT, Answer, Engine, Job
from spec_envs.network.cloud.log import RateLimitedLog
from spec_envs.network.cloud.metrics import Metrics
from spec_envs.network.wire import Refused

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Queued:
    """A job that waits for its answer.

    Attributes:
        owner: sender of the request; the jobs of one owner share its turns.
        since: time of arrival.
        seconds: duration of the forwards that its rows were in so far.
    """

    job: Job
    owner: Hashable
    done: asyncio.Future[Answered]
    since: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0


@dataclass(frozen=True)
class Answered:
    """An answer, the seconds of the forwards that its own rows were in, and the other seconds that it waited."""

    answer: Answer
    seconds: float
    queued: float


class CallingThread(Executor):
    """Runs the calls that other threads submit in the thread that calls ``work``.

    Every thread that computes has its own team of OpenMP threads. With more teams than processors their barriers sleep
    instead of spinning, so forwards are made in the thread that loaded the model.
    """

    def __init__(self) -> None:
        self.todo: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.todo.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def work(self) -> None:
        """Run submitted calls until ``shutdown``."""
        while (item := self.todo.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except Exception as error:
                    future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.todo.put(None)


class Batcher:
    """Runs an engine off the event loop, in rounds.

    A round is one forward of the short requests that wait, which are answered at once, and then one chunk of one long
    request. So a short request waits for one chunk of a long one at most.

    Turns go round-robin: whoever was served least recently is next, among owners and then among the sessions of an
    owner.

    Args:
        engine: holds the sessions of the jobs.
        metrics: counts forwards and answers.
        batching: True if short requests share a forward; otherwise each has its own.
        executor: runs the forwards; by default a thread of its own.
    """

    def __init__(self, engine: Engine, metrics: Metrics, batching: bool = True, executor: Executor | None = None):
        self.engine, self.metrics, self.batching = engine, metrics, batching
        self.executor = executor or ThreadPoolExecutor(1, "target")
        self.waiting: list[Queued] = []
        self.pending = asyncio.Event()
        self.log = RateLimitedLog(LOG)
        self.turns = itertools.count(1)
        self.served: dict[Hashable, int] = {}  # last turn of every owner and slot that has a job waiting

    async def answer(self, job: Job, owner: Hashable = None) -> Answered:
        """Wait for a job's turn and return its answer.

        Raises:
            Refused: the engine failed at the job.
        """
        waiting = Queued(job, owner, asyncio.get_running_loop().create_future())
        self.waiting.append(waiting)
        self.pending.set()
        return await waiting.done

    async def run(self) -> None:
        """Serve rounds until cancelled."""
        with self.executor:
            while True:
                await self.pending.wait()
                short, long = self._next()
                for batch in [short] if self.batching and short else [[w] for w in short]:
                    await self._answer(batch)
                if long is not None and not long.done.cancelled():
                    await (self._answer([long]) if self._fits(long) else self._read(long))
                self.waiting = [w for w in self.waiting if not w.done.done()]
                if not self.waiting:
                    self.pending.clear()

    async def _answer(self, batch: list[Queued]) -> None:
        """Answer jobs in one forward; if that fails, each in its own, so that only the request at fault is refused."""
        try:
            answers = await self._forward(batch, self.engine.run, [w.job for w in batch])
        except Exception as error:
            if len(batch) == 1:
                return self._fail(batch[0], error)
            for waiting in batch:
                await self._answer([waiting])
            return None
        now = time.perf_counter()
        for waiting, answer in zip(batch, answers, strict=True):
            queued = max(0.0, now - waiting.since - waiting.seconds)
            self.metrics.answered(waiting.job, answer, queued)
            if not waiting.done.cancelled():
                waiting.done.set_result(Answered(answer, waiting.seconds, queued))
        return None

    async def _read(self, long: Queued) -> None:
        """Read one chunk of a long request."""
        try:
            await self._forward([long], self.engine.read, long.job)
        except Exception as error:
            self._fail(long, error)

    def _fail(self, waiting: Queued, error: Exception) -> None:
        """Refuse a request at which the engine failed."""
        self.log.warn(f"forward {type(error).__name__}", "a forward failed", error)
        if not waiting.done.cancelled():
            waiting.done.set_exception(Refused("internal", "the cloud failed at a forward; try again"))

    async def _forward(self, batch: list[Queued], call: Callable[[Any], Any], argument: Any) -> Any:
        """Run a call of the engine and return its result; its duration counts for every request in it."""
        begin = time.perf_counter()
        found = await asyncio.get_running_loop().run_in_executor(self.executor, call, argument)
        seconds = time.perf_counter() - begin
        for waiting in batch:
            waiting.seconds += seconds
        self.metrics.batch.observe(len(batch))
        self.metrics.forward.observe(seconds)
        return found

    def _next(self) -> tuple[list[Queued], Queued | None]:
        """Return the requests of this round: as many short ones as fit a forward, and at most one long one.

        Cancelled requests are left out. Of two jobs for one slot, which occur after a connection was lost, the second
        waits for the first.
        """
        alive = [w for w in self.waiting if not w.done.done()]
        first = {w.job.session.slot: w for w in reversed(alive)}
        keys = {w.owner for w in alive} | {("slot", slot) for slot in first}
        self.served = {key: turn for key, turn in self.served.items() if key in keys}
        ready = sorted((w for w in alive if first[w.job.session.slot] is w), key=self._last_served)
        rows = {w: self.engine.rows(w.job) for w in ready}
        short, long = [w for w in ready if rows[w] <= SHORT], [w for w in ready if rows[w] > SHORT]
        if self.batching:
            short = self._fitting(short, rows)
        for waiting in [*short, *long[:1]]:
            turn = next(self.turns)
            self.served |= {waiting.owner: turn, ("slot", waiting.job.session.slot): turn}
        return short, long[0] if long else None

    def _last_served(self, waiting: Queued) -> tuple[int, int, float]:
        slot = ("slot", waiting.job.session.slot)
        return self.served.get(waiting.owner, 0), self.served.get(slot, 0), waiting.since

    def _fitting(self, short: list[Queued], rows: dict[Queued, int]) -> list[Queued]:
        """Return the first requests whose rows, padded to the longest, fit one forward; at least one."""
        chosen: list[Queued] = []
        longest = 0
        for waiting in short:
            padded = max(longest, rows[waiting])
            if chosen and padded * (len(chosen) + 1) > max(SHORT, self.engine.chunk):
                continue
            chosen.append(waiting)
            longest = padded
        return chosen

    def _fits(self, waiting: Queued) -> bool:
        """Return True if one forward answers a request."""
        return self.engine.rows(waiting.job) <= max(SHORT, self.engine.chunk)
