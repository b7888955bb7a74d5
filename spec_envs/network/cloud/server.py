"""The cloud as a WebSocket server: its connections, the sessions that belong to them, and its shutdown."""

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
from spec_envs.network.cloud.admission import SPARE, Admission, Connection
from spec_envs.network.cloud.batching import Batcher
from spec_envs.network.cloud.engine import Engine, Job, Session
from spec_envs.network.cloud.log import RateLimitedLog
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
    """The limits of the cloud.

    Attributes:
        sessions: most sessions at once; there may be twice as many connections.
        tokens: most tokens of a text.
        message: most bytes of a message.
        idle: seconds after which a silent connection is closed, and a session without a connection forgotten.
        grace: seconds that unfinished texts have when the cloud shuts down.
        greeting: seconds that a connection has for its first message.
        per_address: most sessions of one address, which may have twice as many connections; by default ``sessions``.
    """

    sessions: int = 64
    tokens: int = 2048
    message: int = MAX_BYTES
    idle: float = 300.0
    grace: float = 20.0
    greeting: float = 5.0
    per_address: int | None = None

    @property
    def sessions_per_address(self) -> int:
        """Most sessions of one address at once."""
        return self.sessions if self.per_address is None else min(self.sessions, self.per_address)


class Cloud:
    """Serves the sessions of an engine.

    Args:
        engine: the target, with room for ``limits.sessions``.
        limits: on sessions, messages and time.
        token: bearer token that edges have to send; empty if none is needed.
        batching: True if requests that wait at the same time share a forward.
        executor: runs the forwards, as for ``Batcher``.
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
        self.admission = Admission(
            2 * limits.sessions + SPARE, 2 * limits.sessions_per_address + SPARE // 2, message, self.metrics
        )
        self.log = RateLimitedLog(LOG)
        self.attached: dict[bytes, Connection] = {}  # by session
        self.detached: dict[bytes, float] = {}  # when sessions lost their connection
        self.owners: dict[bytes, str] = {}  # addresses from which sessions were opened
        self.handlers: set[Handler] = set()
        self.draining = False
        self.stop_now = asyncio.Event()  # once set, unfinished texts are not waited for

    @contextlib.asynccontextmanager
    async def listening(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> Any:
        """Serve while the block lasts; yield the server.

        Raises:
            OSError: the server cannot listen on the address.
        """
        loop = asyncio.get_running_loop()
        try:
            server = await serve(
                self.handle,  # type: ignore[arg-type]
                host, port, ssl=tls, process_request=self.answer_http, max_size=self.admission.message,
                origins=[None], compression=None, ping_interval=None, max_queue=0, server_header=None,
                open_timeout=self.limits.greeting, close_timeout=2.0,
                create_connection=self.admission.connection,  # type: ignore[arg-type]
            )  # fmt: skip
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
            raise OSError(f"could not listen on {host}:{port} ({reason}); choose another address") from None
        loop.set_exception_handler(self._log_failure)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self.batcher.run()), tasks.create_task(self._forget_silent())]
            try:
                yield server
            finally:
                server.close()
                await server.wait_closed()  # until the last answers are sent
                for task in running:
                    task.cancel()

    def _log_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error that occurred outside of any connection."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            self.admission.exhausted()
        elif not self.draining:
            self.log.warn(type(error).__name__, str(context.get("message")), error)

    def answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        """Return the answer to a plain HTTP request, or the refusal of a WebSocket; None accepts the WebSocket."""
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
        if len(self.handlers) >= 2 * self.limits.sessions and not self.admission.make_room():
            self.metrics.turned_away.labels("full").inc()
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again later\n")
        return None

    async def handle(self, connection: Connection) -> None:
        """Serve one connection to its end; requests that are then unanswered are cancelled."""
        handler = Handler(self, connection)
        self.handlers.add(handler)
        tasks = [asyncio.create_task(handler.serve()), asyncio.create_task(connection.wait_closed())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.handlers.remove(handler)
            await handler.end()

    def check(self, hello: Hello) -> None:
        """Refuse a greeting before it changes anything.

        Raises:
            Refused: the edge does not fit the target, or new texts are no longer accepted.
        """
        self.engine.check(hello)
        if self.draining and hello.session not in self.engine.sessions:
            raise Refused("draining", "the cloud is shutting down and takes no new texts; try another one, or later")

    def attach(self, hello: Hello, connection: Connection) -> Session:
        """Return the session of a greeting; from now on it belongs to this connection.

        Raises:
            Refused: the greeting is refused (``check``), or no session is free.
        """
        self.check(hello)
        if hello.session not in self.engine.sessions:
            self._make_room(connection.address)
        session = self.engine.open(hello)
        other = self.attached.get(hello.session)
        if other is not None and other is not connection:
            other.transport.abort()  # the edge reconnected before its loss was noticed
        self.attached[hello.session] = connection
        self.owners.setdefault(hello.session, connection.address)
        self.detached.pop(hello.session, None)
        self.metrics.sessions.set(len(self.engine.sessions))
        return session

    def _make_room(self, address: str) -> None:
        """If a new session would be one too many, forget one whose edge is away.

        It is one of the same address if that has all its sessions, or else of the address that has most sessions; of
        these, the one whose edge left first.

        Raises:
            Refused: the address has all the sessions that it may have, and their edges are connected.
        """
        held = Counter(self.owners.values())
        away = sorted(self.detached, key=self.detached.__getitem__)
        if held[address] >= self.limits.sessions_per_address < self.limits.sessions:
            away = [key for key in away if self.owners[key] == address]
            if not away:
                raise Refused("busy", f"all {held[address]} sessions of your address are taken; try again later")
            self.forget(away[0])
        elif not self.engine.free and away:
            self.forget(max(away, key=lambda key: held[self.owners[key]]))

    def detach(self, session: Session, connection: Connection, lost: bool) -> None:
        """Detach a session from its connection; it is kept for a while if the connection was ``lost``."""
        key = session.hello.session
        if self.attached.get(key) is not connection:
            return
        del self.attached[key]
        self.detached[key] = time.monotonic()
        if not lost:
            self.forget(key)

    def forget(self, key: bytes) -> None:
        """Forget a session that has no connection."""
        del self.detached[key], self.owners[key]
        self.engine.close(self.engine.sessions[key])
        self.metrics.sessions.set(len(self.engine.sessions))

    async def _forget_silent(self) -> None:
        """Close connections that are silent or do not read their answers; forget sessions whose edges do not return."""
        while True:
            await asyncio.sleep(min(1.0, self.limits.idle / 4, self.limits.greeting / 4))
            now = time.monotonic()
            then = now - self.limits.idle
            self.admission.close_silent(self.limits.greeting)
            for handler in self.handlers:
                if handler.since < then or handler.worked < now - 2 * self.limits.idle:
                    self.metrics.turned_away.labels("idle").inc()
                    handler.connection.transport.abort()
            for key in [key for key, since in self.detached.items() if since < then]:
                self.forget(key)

    async def drain(self) -> None:
        """Refuse new texts and wait for the unfinished ones, also those of edges that lost their connection."""
        self.draining = True
        begin = time.monotonic()
        while self.engine.sessions and time.monotonic() - begin < self.limits.grace and not self.stop_now.is_set():
            await asyncio.sleep(0.05)


class Handler:
    """Handles the messages of one connection.

    Attributes:
        since: time at which a message was last sent or received.
        worked: time at which the answer to a request was last sent.
    """

    def __init__(self, cloud: Cloud, connection: Connection):
        self.cloud, self.connection = cloud, connection
        self.session: Session | None = None
        self.since = self.worked = time.monotonic()
        self.number = -1  # number of the last request; a repeated one is not served twice
        self.streaming: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Answer messages until one has to be refused or the connection ends."""
        try:
            while True:
                await self.answer(await self.connection.recv())
        except Refused as refused:
            await self.refuse(refused)
        except TooManyFragments:
            await self.refuse(Refused("message", "received a message in too many fragments; expected one"))
        except ConnectionClosed:
            pass
        except Exception as error:
            await self._failed(error)

    async def answer(self, frame: Any) -> None:
        """Answer a message.

        Raises:
            Refused: the message is not valid or not allowed.
        """
        self.since = time.monotonic()
        self.cloud.metrics.received.inc(len(frame))
        message = decode(frame)
        del frame  # it may be long, and the message has its own copy
        if isinstance(message, Hello):
            await self._greet(message)
        elif not isinstance(message, (Verify, Plain)):
            raise Refused("message", f"received {type(message).__name__}; expected a request")
        elif self.session is None:
            raise Refused("message", f"received {type(message).__name__}; expected Hello first")
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
        """Delay the answer to a client that sends too many messages without work."""
        if wait := self.connection.allowance.spend():
            await asyncio.sleep(min(wait, 1.0))

    async def _stream(self, request: Plain, job: Job) -> None:
        """Decode plainly and send every token in a message of its own."""
        engine = self.cloud.engine
        stop = set(unpack_ids(request.stop, engine.vocab).tolist())
        try:
            for index in range(request.count):
                done = await self.cloud.batcher.answer(job, self.connection.address)
                token = done.answer.next_token()
                last = index == request.count - 1 or token in stop
                await self._send(Tokens(request.number, token, last, done.seconds, done.queued, index))
                if last:
                    return
                job = engine.following(job, token)
        except Refused as refused:
            await self.refuse(refused)
        except ConnectionClosed:
            pass
        except Exception as error:
            await self._failed(error)

    async def _failed(self, error: Exception) -> None:
        """Close the connection after an unexpected error of the cloud itself."""
        self.cloud.log.warn(f"connection {type(error).__name__}", "a connection failed", error)
        await self.refuse(Refused("internal", "the cloud failed; try again"))

    async def _stop_streaming(self) -> None:
        """Cancel plain decoding that is no longer wanted."""
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
        """Send the reason and close the connection."""
        self.cloud.metrics.refused.labels(refused.code).inc()
        with contextlib.suppress(ConnectionClosed):
            await self._send(refused.message(), work=False)
        await self.connection.close(POLICY, refused.code)

    async def end(self) -> None:
        """Clean up after the connection was closed by the edge or lost."""
        await self._stop_streaming()
        if self.session is not None:
            lost = not self.connection.protocol.close_rcvd_then_sent
            self.cloud.detach(self.session, self.connection, lost)
