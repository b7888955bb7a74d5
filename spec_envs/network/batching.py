"""Requests that wait at the same time share a forward."""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from spec_envs.network.engine import Answer, Engine, Job
from spec_envs.network.metrics import Metrics
from spec_envs.network.wire import Refused

LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class Waiting:
    """A job that nobody works on yet."""

    job: Job
    done: asyncio.Future[Done]
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Done:
    """An answer, the seconds that computing it took, and those that it waited before."""

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
    """Runs an engine off the event loop, one forward after another; what came in meanwhile is the next batch.

    Args:
        together: whether a batch may have more than one job.
        executor: where forwards run, off the event loop; by default a thread.
    """

    def __init__(self, engine: Engine, metrics: Metrics, together: bool = True, executor: Executor | None = None):
        self.engine, self.metrics, self.together = engine, metrics, together
        self.executor = executor or ThreadPoolExecutor(1, "target")
        self.waiting: list[Waiting] = []
        self.some = asyncio.Event()

    async def answer(self, job: Job) -> Done:
        """The answer to a job, once its turn has come.

        Raises:
            Refused: the engine failed at it, or at one that it shared a forward with.
        """
        waiting = Waiting(job, asyncio.get_running_loop().create_future())
        self.waiting.append(waiting)
        self.some.set()
        return await waiting.done

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        with self.executor as executor:
            while True:
                await self.some.wait()
                batch = self._next()
                begin = time.perf_counter()
                try:
                    answers = await loop.run_in_executor(executor, self.engine.run, [w.job for w in batch])
                except Exception:
                    LOG.exception("a forward of %d requests failed", len(batch))
                    for waiting in batch:
                        if not waiting.done.cancelled():
                            waiting.done.set_exception(Refused("internal", "the cloud failed at a forward; try again"))
                    continue
                seconds = time.perf_counter() - begin
                for waiting, answer in zip(batch, answers, strict=True):
                    self.metrics.judged(waiting.job, answer, begin - waiting.since)
                    if not waiting.done.cancelled():
                        waiting.done.set_result(Done(answer, seconds, begin - waiting.since))
                self.metrics.batch.observe(len(batch))
                self.metrics.forward.observe(seconds)

    def _next(self) -> list[Waiting]:
        """Who is served next: everybody who waits, or who has waited longest; not who went away. Of two jobs for a slot,
        as there are after a connection was lost, the second has to wait for the first."""
        alive = [w for w in self.waiting if not w.done.cancelled()]
        first = {w.job.session.slot: w for w in reversed(alive)}
        batch = [w for w in alive if first[w.job.session.slot] is w]
        batch = batch if self.together else batch[:1]
        self.waiting = [w for w in alive if w not in batch]
        if not self.waiting:
            self.some.clear()
        return batch
