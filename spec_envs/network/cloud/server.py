"""The cloud's side of its connections: who is served, what is said, and when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import ssl
import time
from collections import Counter
from concurrent.futures import Executor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, TooManyFragments
from websockets.http11 import Request, Response

from spec_envs.network.authorization import denied
from spec_envs.network.cloud.admission import SPARE, Door, Guest
from spec_envs.network.cloud.batching import Batcher
from spec_envs.network.cloud.engine import Engine, Job, Session
from spec_envs.network.cloud.log import Sparse
from spec_envs.network.cloud.metrics import Metrics
from spec_envs.network.wire import (
    MAX_BYTES,
    Hello,
    Message,
    Plain,
    Refused,
    Tokens,
    Verify,
    Welcome,
    decode,
    encode,
    unpack_ids,
)

POLICY = 1008  # WebSocket close code
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the cloud allows.

    Attributes:
        sessions: at once; twice as many connections.
        tokens: of a text.
        message: bytes.
        idle: seconds after which a connection on which nothing is said is closed, and a session without one forgotten.
        grace: seconds that texts under way have when the cloud shuts down.
        greeting: seconds that a connection has for its first message.
        per_address: sessions of one address; twice as many connections. By default as many as there are.
    """

    sessions: int = 64
    tokens: int = 2048
    message: int = MAX_BYTES
    idle: float = 300.0
    grace: float = 20.0
    greeting: float = 5.0
    per_address: int | None = None

    @property
    def of_one(self) -> int:
        """Most sessions of one address."""
        return self.sessions if self.per_address is None else min(self.sessions, self.per_address)


class Cloud:
    """Serves the sessions of an engine.

    Args:
        engine: the target with room for ``limits.sessions``.
        limits: see ``Limits``.
        token: that edges have to bear; empty asks for none.
        batching: whether requests that wait at the same time share a forward.
        executor: where forwards run; see ``Batcher``.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        token: str = "",
        batching: bool = True,
        executor: Executor | None = None,
    ):
        self.engine, self.limits, self.token = engine, limits, token
        self.metrics = Metrics()
        self.batcher = Batcher(engine, self.metrics, batching, executor)
        message = min(limits.message, engine.longest_request)
        self.door = Door(2 * limits.sessions + SPARE, 2 * limits.of_one + SPARE // 2, message, self.metrics)
        self.lines = Sparse(LOG)
        self.attached: dict[bytes, Guest] = {}  # by session
        self.detached: dict[bytes, float] = {}  # when the connections of sessions were lost
        self.owners: dict[bytes, str] = {}  # addresses that sessions were opened from
        self.talks: set[Conversation] = set()
        self.draining = False
        self.hurry = asyncio.Event()  # set: texts under way are not waited for

    @contextlib.asynccontextmanager
    async def listening(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> Any:
        """Serve while the block lasts; yields the server.

        Raises:
            OSError: the address cannot be listened on.
        """
        loop = asyncio.get_running_loop()
        try:
            server = await serve(
                self.connected, host, port, ssl=tls, process_request=self.received, max_size=self.door.message,
                origins=[None], compression=None, ping_interval=None, close_timeout=2.0, server_header=None, max_queue=0,
                open_timeout=self.limits.greeting, create_connection=self.door.guest,  # type: ignore[arg-type]
            )  # fmt: skip
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
            raise OSError(f"could not listen on {host}:{port} ({reason}); choose another address") from None
        loop.set_exception_handler(self._complain)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self.batcher.run()), tasks.create_task(self._forget_silent())]
            try:
                yield server
            finally:
                server.close()
                await server.wait_closed()  # the last answers are still worked out
                for task in running:
                    task.cancel()

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what failed outside of any connection: a line of each kind, for strangers could have many made."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            self.door.exhausted()
        elif not self.draining:
            self.lines.warn(type(error).__name__, str(context.get("message")), error)

    def received(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP, and refuse connections before they are made."""
        if request.path == "/healthz":
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE if self.draining else HTTPStatus.OK,
                "draining\n" if self.draining else "ok\n",
            )
        if refusal := denied(request.headers.get_all("Authorization"), self.token):
            status, challenge, sentence = refusal
            self.metrics.turned_away.labels("token").inc()
            response = connection.respond(status, sentence)
            response.headers["WWW-Authenticate"] = challenge
            return response
        if request.path == "/metrics":
            kind, body = self.metrics.page()
            headers = Headers({"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"})
            return Response(HTTPStatus.OK.value, "OK", headers, body)
        if request.path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, "there are /, /healthz and /metrics\n")
        if len(self.talks) >= 2 * self.limits.sessions and not self.door.make_room():
            self.metrics.turned_away.labels("full").inc()
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again later\n")
        return None

    async def connected(self, connection: ServerConnection) -> None:
        """Serve one connection to its end. What is still asked for when it ends is not worked on any more."""
        assert isinstance(connection, Guest)
        talk = Conversation(self, connection)
        self.talks.add(talk)
        tasks = [asyncio.create_task(talk.serve()), asyncio.create_task(connection.wait_closed())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.talks.remove(talk)
            await talk.end()

    def check(self, hello: Hello) -> None:
        """Refuse a greeting that is not to change anything.

        Raises:
            Refused: the edge does not fit the target, or new texts are not taken any more.
        """
        self.engine.check(hello)
        if self.draining and hello.session not in self.engine.sessions:
            raise Refused("draining", "the cloud is shutting down and takes no new texts; try another one, or later")

    def attach(self, hello: Hello, connection: Guest) -> Session:
        """The session of a greeting, which from now on belongs to this connection.

        Raises:
            Refused: there is none to be had.
        """
        self.check(hello)
        if hello.session not in self.engine.sessions:
            self._make_room(connection.address)
        session = self.engine.open(hello)
        other = self.attached.get(hello.session)
        if other is not None and other is not connection:
            other.transport.abort()  # the edge came back before its loss was noticed here
        self.attached[hello.session] = connection
        self.owners.setdefault(hello.session, connection.address)
        self.detached.pop(hello.session, None)
        self.metrics.sessions.set(len(self.engine.sessions))
        return session

    def _make_room(self, address: str) -> None:
        """Forget a session whose edge is away, where a new one would be too many: of its own address, or of the one that
        has most; of these the one that left first.

        Raises:
            Refused: the address has all the sessions that it may have, and their edges are there.
        """
        held = Counter(self.owners.values())
        away = sorted(self.detached, key=self.detached.__getitem__)
        if held[address] >= self.limits.of_one < self.limits.sessions:
            away = [key for key in away if self.owners[key] == address]
            if not away:
                raise Refused("busy", f"all {held[address]} sessions of your address are taken; try again later")
            self.forget(away[0])
        elif not self.engine.free and away:
            self.forget(max(away, key=lambda key: held[self.owners[key]]))

    def detach(self, session: Session, connection: Guest, lost: bool) -> None:
        """A connection goes; where it was ``lost`` its session is kept for a while."""
        key = session.hello.session
        if self.attached.get(key) is not connection:
            return
        del self.attached[key]
        self.detached[key] = time.monotonic()
        if not lost:
            self.forget(key)

    def forget(self, key: bytes) -> None:
        """Drop a session without a connection."""
        del self.detached[key], self.owners[key]
        self.engine.close(self.engine.sessions[key])
        self.metrics.sessions.set(len(self.engine.sessions))

    async def _forget_silent(self) -> None:
        """Drop connections on which nothing is said, or what is said is not read, and sessions whose edges do not come
        back."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.idle / 4, self.limits.greeting / 4))
            now = time.monotonic()
            then = now - self.limits.idle
            self.door.close_silent(self.limits.greeting)
            for talk in self.talks:
                if talk.since < then or talk.worked < now - 2 * self.limits.idle:
                    self.metrics.turned_away.labels("idle").inc()
                    talk.connection.transport.abort()
            for key in [key for key, since in self.detached.items() if since < then]:
                self.forget(key)

    async def drain(self) -> None:
        """Take no new texts, and wait for those under way, also for edges that lost their connection."""
        self.draining = True
        begin = time.monotonic()
        while self.engine.sessions and time.monotonic() - begin < self.limits.grace and not self.hurry.is_set():
            await asyncio.sleep(0.05)


class Conversation:
    """What is said on one connection.

    Attributes:
        since: when something was last said.
        worked: when something was last said that there was work in.
    """

    def __init__(self, cloud: Cloud, connection: Guest):
        self.cloud, self.connection = cloud, connection
        self.session: Session | None = None
        self.since = self.worked = time.monotonic()
        self.number = -1  # of the last request: one that comes in twice is not served twice
        self.streaming: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Answer message after message, until one has to be refused or the connection ends."""
        try:
            while True:
                await self.take(await self.connection.recv())
        except Refused as refused:
            await self.refuse(refused)
        except TooManyFragments:
            await self.refuse(Refused("message", "a message came in too many fragments; expected one"))
        except ConnectionClosed:
            pass
        except Exception as error:
            await self._failed(error)

    async def take(self, frame: Any) -> None:
        """Answer a message.

        Raises:
            Refused: it cannot be.
        """
        self.since = time.monotonic()
        self.cloud.metrics.received.inc(len(frame))
        message = decode(frame)
        del frame  # as long as a request may be, and what is needed of it was copied
        if isinstance(message, Hello):
            await self._greet(message)
        elif not isinstance(message, (Verify, Plain)):
            raise Refused("message", f"a {type(message).__name__} came in; expected a request")
        elif self.session is None:
            raise Refused("message", f"a {type(message).__name__} came in; expected Hello first")
        elif message.number > self.number:
            self.number = message.number
            await self._stop_streaming()
            job = self.cloud.engine.job(self.session, message)
            if isinstance(message, Plain):
                self.streaming = asyncio.create_task(self._stream(message, job))
                return
            done = await self.cloud.batcher.answer(job, self.connection.address)
            await self._send(done.answer.verdict(message.number, done.seconds, done.queued))
        else:
            await self._slow_down()

    async def _greet(self, hello: Hello) -> None:
        if self.session is None or self.session.hello != hello:
            self.cloud.check(hello)
            await self._stop_streaming()
            if self.session is not None and self.session.hello.session != hello.session:
                self.cloud.detach(self.session, self.connection, lost=False)
            self.session = self.cloud.attach(hello, self.connection)
            self.connection.greet()
        await self._slow_down()
        engine = self.cloud.engine
        await self._send(Welcome(len(self.session.tokens), engine.context, engine.vocab), work=False)

    async def _slow_down(self) -> None:
        """Let who says much that is no work wait for the answer."""
        if wait := self.connection.allowance.spend():
            await asyncio.sleep(min(wait, 1.0))

    async def _stream(self, request: Plain, job: Job) -> None:
        """Send token after token."""
        engine = self.cloud.engine
        stop = set(unpack_ids(request.stop, engine.vocab).tolist())
        try:
            for index in range(request.count):
                done = await self.cloud.batcher.answer(job, self.connection.address)
                token = done.answer.token
                assert token is not None
                last = index == request.count - 1 or token in stop
                await self._send(Tokens(request.number, token, last, done.seconds, done.queued, index))
                if last:
                    return
                job = engine.going_on(job, token)
        except Refused as refused:
            await self.refuse(refused)
        except ConnectionClosed:
            pass
        except Exception as error:
            await self._failed(error)

    async def _failed(self, error: Exception) -> None:
        """End a connection at a fault of our own."""
        self.cloud.lines.warn(f"connection {type(error).__name__}", "a connection failed", error)
        await self.refuse(Refused("internal", "the cloud failed; try again"))

    async def _stop_streaming(self) -> None:
        """Break off plain decoding that nobody wants any more."""
        if self.streaming is not None:
            self.streaming.cancel()
            await asyncio.gather(self.streaming, return_exceptions=True)
            self.streaming = None

    async def _send(self, message: Message, work: bool = True) -> None:
        frame = encode(message)
        self.cloud.metrics.sent.inc(len(frame))
        await self.connection.send(frame)
        self.since = time.monotonic()
        if work:
            self.worked = self.since
            self.connection.allowance.earn()

    async def refuse(self, refused: Refused) -> None:
        """Say why, and close the connection."""
        self.cloud.metrics.refused.labels(refused.code).inc()
        with contextlib.suppress(ConnectionClosed):
            await self._send(refused.message(), work=False)
        await self.connection.close(POLICY, refused.code)

    async def end(self) -> None:
        """The connection is closed: with a greeting, or it was lost."""
        await self._stop_streaming()
        if self.session is not None:
            lost = not self.connection.protocol.close_rcvd_then_sent
            self.cloud.detach(self.session, self.connection, lost)
