"""A channel over a WebSocket that survives the loss of its connection."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
from msgspec.structs import replace
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    stop_all,
    wait_random_exponential,
)
from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, reconnect
from websockets.uri import parse_uri

from spec_envs.decoding.verifier import Traffic
from spec_envs.network.authorization import TOKEN, check_token, is_loopback
from spec_envs.network.edge.answers import check_welcome, one_line
from spec_envs.network.wire import (
    LATER,
    Hello,
    Message,
    Plain,
    Refused,
    Tokens,
    Verdict,
    Verify,
    Welcome,
    decode,
    encode,
    expect,
    pack_ids,
)

PING_EVERY = 8  # tokens of a stream
LONGEST_ANSWER = 4 * 2**20  # bytes: logits of a vocabulary of half a million in float64
ANY = 2**31  # more tokens than any text has
T = TypeVar("T")
M = TypeVar("M", Verdict, Tokens)


class CloudUnavailable(ConnectionError):
    """Raised if the cloud does not answer."""


def is_transient(error: BaseException) -> bool:
    """Return True if another attempt may succeed, because the connection failed or the cloud is busy."""
    if isinstance(error, InvalidStatus):
        return error.response.status_code >= 500
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, Refused):
        return error.code in (*LATER, "message")
    return isinstance(error, (OSError, WebSocketException, EOFError))


class DirectConnection(reconnect):
    """A connection that does not follow redirects."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


def check_address(url: str) -> str:
    """Return the host of a cloud's address.

    Raises:
        ValueError: the address is not valid.
    """
    expected = f"the cloud's address is {one_line(url)!r}; expected ws://host:port, or wss:// with TLS"
    if not url.startswith(("ws://", "wss://")) or "#" in url or not url.isprintable() or " " in url:
        raise ValueError(expected)
    try:
        found = parse_uri(url)
        found.host.encode("idna")
    except (WebSocketException, ValueError):
        raise ValueError(expected) from None
    if found.user_info:
        raise ValueError(f"the cloud's address has a user name in it; expected ws://host:port, and a token in {TOKEN}")
    return found.host


class SocketChannel:
    """A WebSocket to a cloud.

    A lost connection is reopened, with back-off, and the request is repeated for the part of the text that the cloud
    still has; the cloud's answer is the same.

    Args:
        url: ``ws://host:port`` or ``wss://…``.
        patience: seconds after which a cloud that does not answer is given up, at the earliest after a second attempt.
        timeout: most seconds of an answer, if ``patience`` is not shorter.
        token: token for a cloud that needs one; by default the environment variable ``SPEC_ENVS_TOKEN``.
        in_clear: True to allow sending the token to another machine without TLS.

    Raises:
        ValueError: the address is not valid, or the token would be sent in clear.
    """

    def __init__(
        self,
        url: str,
        patience: float = 20.0,
        timeout: float = 60.0,
        token: str | None = None,
        in_clear: bool = False,
    ):
        host = check_address(url)
        self.url, self.patience, self.timeout, self.in_clear = url, patience, timeout, in_clear
        self.token = token if token is not None else os.environ.get(TOKEN, "")
        check_token(self.token)
        if self.token and url.startswith("ws://") and not is_loopback(host) and not in_clear:
            raise ValueError(
                f"the token in {TOKEN} would go to {host} in clear; take wss:// and a cloud with TLS, or allow it "
                "(--token-in-clear)"
            )
        self.connection: ClientConnection | None = None
        self.hello: Hello | None = None
        self.have = self.vocab = 0  # tokens that the cloud had when the connection was opened; size of its vocabulary
        self.rtt = 0.0

    def begin(self, hello: Hello, rng: np.random.Generator) -> tuple[Welcome, Traffic]:
        self.hello = hello

        def attempt() -> tuple[Welcome, Traffic]:
            if self.connection is None:
                self._connect()
            return self._greet()

        return self._with_retries(attempt)

    def exchange(self, shared: int, request: Callable[[int], Verify]) -> tuple[Verdict, Traffic]:
        def attempt() -> tuple[Verdict, Traffic]:
            message = request(self._reconnected(shared))
            began = time.perf_counter()
            up = self._send(message)
            verdict, down = self._answer(message.number, Verdict)
            elapsed = time.perf_counter() - began
            self._ping()  # while the link is idle, so that the next exchange knows the round trip
            return verdict, Traffic(up, down, max(0.0, elapsed - verdict.seconds - verdict.queued))

        return self._with_retries(attempt)

    def stream(self, shared: int, request: Callable[[int], Plain]) -> Iterator[tuple[Tokens, Traffic]]:
        got: list[int] = []
        asked = 0  # number of them when the request was made

        def attempt() -> tuple[Tokens, Traffic]:
            nonlocal asked
            up, began = 0, time.perf_counter()
            if self.connection is None or not got:
                plain, asked = request(self._reconnected(shared)), len(got)
                text = plain.text + pack_ids(got, self.vocab)
                up = self._send(replace(plain, text=text, count=plain.count - asked))
                self.number = plain.number
            while True:
                tokens, down = self._answer(self.number, Tokens)
                if tokens.index >= len(got) - asked:  # otherwise it is a repeated message
                    break
            if tokens.index > len(got) - asked:
                raise Refused("message", f"received token {tokens.index} of a stream; expected {len(got) - asked}")
            elapsed = time.perf_counter() - began
            if tokens.index % PING_EVERY == 0:
                self._ping()
            return tokens, Traffic(up, down, max(0.0, elapsed - tokens.seconds - tokens.queued))

        last = False
        while not last:
            tokens, traffic = self._with_retries(attempt)
            got.append(tokens.token)
            last = tokens.last
            yield tokens, traffic

    def idle(self) -> None:
        """Do nothing: time passes on a real link by itself."""

    def another(self) -> SocketChannel:
        return SocketChannel(self.url, self.patience, self.timeout, self.token, self.in_clear)

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    def _with_retries(self, attempt: Callable[[], T]) -> T:
        """Return the result of ``attempt``, which is repeated while its failures are transient."""

        def drop(state: RetryCallState) -> None:
            if state.outcome is not None and state.outcome.failed:
                self._drop()

        tries = Retrying(
            retry=retry_if_exception(is_transient),
            wait=wait_random_exponential(multiplier=0.05, max=2.0),
            stop=stop_all(stop_after_delay(self.patience), stop_after_attempt(2)),
            after=drop,
            reraise=True,
        )
        try:
            found: T = tries(attempt)
            return found
        except BaseException as error:
            self._drop()
            reason = one_line(str(error)) or type(error).__name__
            if isinstance(error, InvalidStatus) and error.response.status_code == 401:
                raise ValueError(f"the cloud at {self.url} needs a bearer token; set {TOKEN} to its own") from None
            if isinstance(error, Refused) and not is_transient(error):
                raise ValueError(f"the cloud at {self.url} refused: {reason}") from None
            if isinstance(error, (Refused, WebSocketException, OSError, EOFError)):
                raise CloudUnavailable(
                    f"the cloud at {self.url} does not answer ({reason}); start one with `spec-envs cloud`, or "
                    "check the address"
                ) from None
            raise

    def _connect(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        context = ssl.create_default_context() if self.url.startswith("wss://") else None
        try:
            self.connection = DirectConnection(
                self.url,
                additional_headers=headers,
                ssl=context,
                max_size=LONGEST_ANSWER,
                compression=None,
                proxy=None,
                open_timeout=min(10.0, self.patience),
                close_timeout=1.0,
                ping_interval=None,
                max_queue=4,
            ).__enter__()
        except InvalidHandshake:
            raise
        except EOFError as error:  # closed in the middle of the handshake
            raise ConnectionError(str(error)) from None

    def _greet(self) -> tuple[Welcome, Traffic]:
        """Send the greeting on an open connection and return the cloud's."""
        if self.hello is None:
            raise RuntimeError("the channel has no session; call begin first")
        began, deadline = time.perf_counter(), self._deadline()
        up = self._send(self.hello)
        while isinstance(message := decode(reply := self._receive(deadline)), (Verdict, Tokens)):
            pass  # an answer of a text that was given up
        self.rtt = time.perf_counter() - began
        welcome = expect(message, Welcome)
        self.have, self.vocab = welcome.have, welcome.vocab
        return welcome, Traffic(up, len(reply), self.rtt)

    def _reconnected(self, shared: int) -> int:
        """Connect if necessary, and return how many of the first ``shared`` tokens of the text the cloud has."""
        if self.connection is None:
            self._connect()
            vocab = self.vocab
            welcome, _ = self._greet()
            check_welcome(welcome, vocab, ANY)
            return min(shared, self.have)
        return shared

    def _send(self, message: Message) -> int:
        frame = encode(message)
        self._open().send(frame)
        return len(frame)

    def _deadline(self) -> float:
        """Return the time by which an answer has to arrive; other messages do not extend it."""
        return time.monotonic() + min(self.timeout, self.patience)

    def _receive(self, deadline: float) -> Any:
        return self._open().recv(timeout=max(0.0, deadline - time.monotonic()))

    def _open(self) -> ClientConnection:
        if self.connection is None:
            raise ConnectionError("there is no connection to the cloud")
        return self.connection

    def _ping(self) -> None:
        """Store the last measured round trip and start measuring the next one."""
        connection = self._open()
        self.rtt = connection.latency or self.rtt
        connection.ping()

    def _answer(self, number: int, kind: type[M]) -> tuple[M, int]:
        """Return the answer to request ``number`` and its bytes; answers to repeated requests are skipped."""
        deadline = self._deadline()
        while True:
            reply = self._receive(deadline)
            message = decode(reply)
            if isinstance(message, (Verdict, Tokens)) and message.number != number:
                continue
            if isinstance(message, Welcome):
                continue
            return expect(message, kind), len(reply)

    def _drop(self) -> None:
        """Discard a connection that failed."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close_socket()
