"""Whose requests are worked on next, and which of them share a forward."""

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

from spec_envs.network.cloud.engine import TOGETHER, Answer, Engine, Job
from spec_envs.network.cloud.log import Sparse
from spec_envs.network.cloud.metrics import Metrics
from spec_envs.network.wire import Refused

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Waiting:
    """A job that is not answered yet.

    Attributes:
        owner: on whose behalf: those of one owner share its turns.
        since: when it came in.
        seconds: of the forwards that its rows were in so far.
    """

    job: Job
    owner: Hashable
    done: asyncio.Future[Done]
    since: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0


@dataclass(frozen=True)
class Done:
    """An answer, the seconds of the forwards that its own rows were in, and all others that it waited."""

    answer: Answer
    seconds: float
    queued: float


class Here(Executor):
    """Runs what other threads submit in the thread that calls ``work``.

    A thread that computes has a team of OpenMP threads of its own, and where there are more teams than processors their
    barriers sleep instead of spinning. So forwards are made in the thread that loaded the model.
    """

    def __init__(self) -> None:
        self.todo: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.todo.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def work(self) -> None:
        """Run what is submitted until ``shutdown``."""
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
    """Runs an engine off the event loop, in rounds: a forward of the short requests that wait, which are answered at once,
    and then one chunk of one long request. So nobody waits for more than a chunk of what others send.

    Both go round: who was served least recently is next, among owners and then among the sessions of one owner.

    Args:
        engine: with the sessions of the jobs.
        metrics: count what is done.
        together: whether short requests share a forward; else each has its own.
        executor: where forwards run; by default a thread of its own.
    """

    def __init__(self, engine: Engine, metrics: Metrics, together: bool = True, executor: Executor | None = None):
        self.engine, self.metrics, self.together = engine, metrics, together
        self.executor = executor or ThreadPoolExecutor(1, "target")
        self.waiting: list[Waiting] = []
        self.some = asyncio.Event()
        self.lines = Sparse(LOG)
        self.turns = itertools.count(1)
        self.served: dict[Hashable, int] = {}  # the last turn of owners, and of slots, that wait

    async def answer(self, job: Job, owner: Hashable = None) -> Done:
        """The answer to a job, once its turn has come.

        Raises:
            Refused: the engine failed at it, or at one that it shared a forward with.
        """
        waiting = Waiting(job, owner, asyncio.get_running_loop().create_future())
        self.waiting.append(waiting)
        self.some.set()
        return await waiting.done

    async def run(self) -> None:
        """Work until cancelled."""
        with self.executor:
            while True:
                await self.some.wait()
                short, long = self._next()
                for batch in [short] if self.together and short else [[w] for w in short]:
                    await self._answer(batch)
                if long is not None and not long.done.cancelled():
                    await (self._answer([long]) if self._fits(long) else self._read(long))
                self.waiting = [w for w in self.waiting if not w.done.done()]
                if not self.waiting:
                    self.some.clear()

    async def _answer(self, batch: list[Waiting]) -> None:
        """Answer jobs in one forward; where that fails, each in its own, so that nobody pays for another's request."""
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
            self.metrics.judged(waiting.job, answer, queued)
            if not waiting.done.cancelled():
                waiting.done.set_result(Done(answer, waiting.seconds, queued))
        return None

    async def _read(self, long: Waiting) -> None:
        """Read a chunk of a long request."""
        try:
            await self._forward([long], self.engine.read, long.job)
        except Exception as error:
            self._fail(long, error)

    def _fail(self, waiting: Waiting, error: Exception) -> None:
        """Refuse a request at which the engine failed."""
        self.lines.warn(f"forward {type(error).__name__}", "a forward failed", error)
        if not waiting.done.cancelled():
            waiting.done.set_exception(Refused("internal", "the cloud failed at a forward; try again"))

    async def _forward(self, batch: list[Waiting], call: Callable[[Any], Any], argument: Any) -> Any:
        """Run the engine and return what it returns; its seconds are those of every request in it."""
        begin = time.perf_counter()
        found = await asyncio.get_running_loop().run_in_executor(self.executor, call, argument)
        seconds = time.perf_counter() - begin
        for waiting in batch:
            waiting.seconds += seconds
        self.metrics.batch.observe(len(batch))
        self.metrics.forward.observe(seconds)
        return found

    def _next(self) -> tuple[list[Waiting], Waiting | None]:
        """Who is served in this round: as many short requests as fit a forward, and maybe a long one; nobody who went
        away. Of two jobs for a slot, as there are after a connection was lost, the second waits for the first."""
        alive = [w for w in self.waiting if not w.done.done()]
        first = {w.job.session.slot: w for w in reversed(alive)}
        keys = {w.owner for w in alive} | {("slot", slot) for slot in first}
        self.served = {key: turn for key, turn in self.served.items() if key in keys}
        ready = sorted((w for w in alive if first[w.job.session.slot] is w), key=self._last_served)
        rows = {w: self.engine.rows(w.job) for w in ready}
        short, long = [w for w in ready if rows[w] <= TOGETHER], [w for w in ready if rows[w] > TOGETHER]
        if self.together:
            short = self._fitting(short, rows)
        for waiting in [*short, *long[:1]]:
            turn = next(self.turns)
            self.served |= {waiting.owner: turn, ("slot", waiting.job.session.slot): turn}
        return short, long[0] if long else None

    def _last_served(self, waiting: Waiting) -> tuple[int, int, float]:
        slot = ("slot", waiting.job.session.slot)
        return self.served.get(waiting.owner, 0), self.served.get(slot, 0), waiting.since

    def _fitting(self, short: list[Waiting], rows: dict[Waiting, int]) -> list[Waiting]:
        """The first ones of those whose rows, padded to the longest, fit a forward; one at least."""
        chosen: list[Waiting] = []
        longest = 0
        for waiting in short:
            padded = max(longest, rows[waiting])
            if chosen and padded * (len(chosen) + 1) > max(TOGETHER, self.engine.chunk):
                continue
            chosen.append(waiting)
            longest = padded
        return chosen

    def _fits(self, waiting: Waiting) -> bool:
        """Whether one forward answers a request."""
        return self.engine.rows(waiting.job) <= max(TOGETHER, self.engine.chunk)
