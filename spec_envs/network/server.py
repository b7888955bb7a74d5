"""The cloud's side of its connections: who is served, what is said, and when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import ssl
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from spec_envs.network.batching import Batcher
from spec_envs.network.engine import Engine, Session
from spec_envs.network.metrics import Metrics
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


@dataclass(frozen=True)
class Limits:
    """What the cloud allows.

    Attributes:
        sessions: at once; twice as many connections.
        tokens: of a text.
        message: bytes.
        idle: seconds after which a connection on which nothing is said is closed, and a session without one forgotten.
        grace: seconds that texts under way have when the cloud shuts down.
    """

    sessions: int = 64
    tokens: int = 2048
    message: int = MAX_BYTES
    idle: float = 300.0
    grace: float = 20.0


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
        self.attached: dict[bytes, ServerConnection] = {}  # by session
        self.detached: dict[bytes, float] = {}  # when the connections of sessions were lost
        self.talks: set[Conversation] = set()
        self.draining = False

    @contextlib.asynccontextmanager
    async def listening(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> Any:
        """Serve while the block lasts; yields the server.

        Raises:
            OSError: the address cannot be listened on.
        """
        try:
            server = await serve(
                self.connected, host, port, ssl=tls, process_request=self.received, max_size=self.limits.message,
                origins=[None], compression=None, ping_interval=None, close_timeout=2.0, server_header=None, max_queue=4,
            )  # fmt: skip
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
            raise OSError(f"could not listen on {host}:{port} ({reason}); choose another address") from None
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self.batcher.run()), tasks.create_task(self._forget_silent())]
            try:
                yield server
            finally:
                server.close()
                await server.wait_closed()  # the last answers are still worked out
                for task in running:
                    task.cancel()

    def received(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP, and refuse connections before they are made."""
        if request.path == "/healthz":
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE if self.draining else HTTPStatus.OK,
                "draining\n" if self.draining else "ok\n",
            )
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token and not hmac.compare_digest(given.encode(), self.token.encode()):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "expected Authorization: Bearer and the cloud's token\n")
        if request.path == "/metrics":
            kind, body = self.metrics.page()
            headers = Headers({"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"})
            return Response(HTTPStatus.OK.value, "OK", headers, body)
        if request.path != "/":
            return connection.respond(HTTPStatus.NOT_FOUND, "there are /, /healthz and /metrics\n")
        if len(self.talks) >= 2 * self.limits.sessions:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again later\n")
        return None

    async def connected(self, connection: ServerConnection) -> None:
        """Serve one connection to its end."""
        talk = Conversation(self, connection)
        self.talks.add(talk)
        try:
            while True:
                await talk.take(await connection.recv())
        except Refused as refused:
            await talk.refuse(refused)
        except ConnectionClosed:
            pass
        finally:
            self.talks.remove(talk)
            await talk.end()

    def attach(self, hello: Hello, connection: ServerConnection) -> Session:
        """The session of a greeting, which from now on belongs to this connection.

        Raises:
            Refused: there is none to be had.
        """
        if self.draining and hello.session not in self.engine.sessions:
            raise Refused("draining", "the cloud is shutting down and takes no new texts; try another one, or later")
        if not self.engine.free and self.detached and hello.session not in self.engine.sessions:
            self.forget(min(self.detached, key=self.detached.__getitem__))  # who left first
        session = self.engine.open(hello)
        other = self.attached.get(hello.session)
        if other is not None and other is not connection:
            other.transport.abort()  # the edge came back before its loss was noticed here
        self.attached[hello.session] = connection
        self.detached.pop(hello.session, None)
        self.metrics.sessions.set(len(self.engine.sessions))
        return session

    def detach(self, session: Session, connection: ServerConnection, lost: bool) -> None:
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
        del self.detached[key]
        self.engine.close(self.engine.sessions[key])
        self.metrics.sessions.set(len(self.engine.sessions))

    async def _forget_silent(self) -> None:
        """Drop connections on which nothing is said, or what is said is not read, and sessions whose edges do not come
        back."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.idle / 4))
            then = time.monotonic() - self.limits.idle
            for talk in self.talks:
                if talk.since < then:
                    talk.connection.transport.abort()
            for key in [key for key, since in self.detached.items() if since < then]:
                self.forget(key)

    async def drain(self) -> None:
        """Take no new texts, and wait for those under way, also for edges that lost their connection."""
        self.draining = True
        begin = time.monotonic()
        while self.engine.sessions and time.monotonic() - begin < self.limits.grace:
            await asyncio.sleep(0.05)


class Conversation:
    """What is said on one connection.

    Attributes:
        since: when something was last said.
    """

    def __init__(self, cloud: Cloud, connection: ServerConnection):
        self.cloud, self.connection = cloud, connection
        self.session: Session | None = None
        self.since = time.monotonic()
        self.number = -1  # of the last request: one that comes in twice is not served twice
        self.streaming: asyncio.Task[None] | None = None

    async def take(self, frame: Any) -> None:
        """Answer a message.

        Raises:
            Refused: it cannot be.
        """
        self.since = time.monotonic()
        self.cloud.metrics.received.inc(len(frame))
        message = decode(frame)
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
            done = await self.cloud.batcher.answer(job)
            await self._send(done.answer.verdict(message.number, done.seconds, done.queued))

    async def _greet(self, hello: Hello) -> None:
        if self.session is None or self.session.hello != hello:
            await self._stop_streaming()
            if self.session is not None and self.session.hello.session != hello.session:
                self.cloud.detach(self.session, self.connection, lost=False)
            self.session = self.cloud.attach(hello, self.connection)
        engine = self.cloud.engine
        await self._send(Welcome(len(self.session.tokens), engine.context, engine.vocab))

    async def _stream(self, request: Plain, job: Any) -> None:
        """Send token after token."""
        engine = self.cloud.engine
        stop = set(unpack_ids(request.stop, engine.vocab).tolist())
        try:
            for index in range(request.count):
                done = await self.cloud.batcher.answer(job)
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
        except Exception:
            logging.exception("a stream failed")
            await self.refuse(Refused("internal", "the cloud failed; try again"))

    async def _stop_streaming(self) -> None:
        """Break off plain decoding that nobody wants any more."""
        if self.streaming is not None:
            self.streaming.cancel()
            await asyncio.gather(self.streaming, return_exceptions=True)
            self.streaming = None

    async def _send(self, message: Message) -> None:
        frame = encode(message)
        self.cloud.metrics.sent.inc(len(frame))
        await self.connection.send(frame)
        self.since = time.monotonic()

    async def refuse(self, refused: Refused) -> None:
        """Say why, and close the connection."""
        self.cloud.metrics.refused.labels(refused.code).inc()
        with contextlib.suppress(ConnectionClosed):
            await self._send(refused.message())
        await self.connection.close(POLICY, refused.code)

    async def end(self) -> None:
        """The connection is closed: with a greeting, or it was lost."""
        await self._stop_streaming()
        if self.session is not None:
            lost = not self.connection.protocol.close_rcvd_then_sent
            self.cloud.detach(self.session, self.connection, lost)
