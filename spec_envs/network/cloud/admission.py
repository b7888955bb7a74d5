"""Admission control: limits of connections, and of frames that ask for no work."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import Counter
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import CloseCode, Frame, Opcode

from spec_envs.network.cloud.log import RateLimitedLog
from spec_envs.network.cloud.metrics import Metrics

PIECE = 4096  # bytes that are parsed at a time
HELLO = 4096  # most bytes of a first message; a greeting has less than a hundred
UNREAD = 4 * 2**20  # most bytes of answers that a client has not read, twice the longest answer
SPARE = 16  # connections beyond those of edges, for health checks and metrics
PATIENCE = 1.0  # seconds for which even a full cloud waits for a greeting
CREDIT, REFILL, EARNED = 400.0, 50.0, 2.0  # frames without work: most at once, more per second, more per answer
LOG = logging.getLogger(__name__)


class Allowance:
    """A token bucket for the frames of a connection that ask for no work: pings, fragments and repeated messages."""

    def __init__(self) -> None:
        self.left, self.at = CREDIT, time.monotonic()

    def earn(self) -> None:
        """Allow more frames after an answer, because an edge measures round trips between its requests."""
        self.left = min(CREDIT, self.left + EARNED)

    def spend(self) -> float:
        """Count a frame and return how many seconds too early it came; 0 if it is within the allowance."""
        now = time.monotonic()
        self.left = min(CREDIT, self.left + (now - self.at) * REFILL) - 1
        self.at = now
        return max(0.0, -self.left / REFILL)


def client_address(host: str) -> str:
    """Return the address by which a client is counted: its /64 network for IPv6, because every client has a whole
    one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class Admission:
    """Limits the number of connections, in all and per address, from the moment that they are made.

    Args:
        most, per_address: most connections at once, in all and of one address.
        message: most bytes of a message after the greeting.
        metrics: counts the connections that are closed, by reason.
    """

    def __init__(self, most: int, per_address: int, message: int, metrics: Metrics):
        self.most, self.per_address, self.message, self.metrics = most, per_address, message, metrics
        self.connections: dict[Connection, float] = {}  # and when each was made, the oldest first
        self.addresses: Counter[str] = Counter()
        self.log = RateLimitedLog(LOG)

    def connection(self, *arguments: Any, **settings: Any) -> Connection:
        """Return a connection for a new client; the server calls this as its factory."""
        return Connection(self, *arguments, **settings)

    def admit(self, connection: Connection) -> None:
        """Admit a connection, or close it if there are too many."""
        self.connections[connection] = time.monotonic()
        self.addresses[connection.address] += 1
        if self.addresses[connection.address] > self.per_address and not self.make_room(connection.address):
            self.drop(connection, "address", "an address has all the connections that it may have")
        elif len(self.connections) > self.most and not self.make_room():
            self.drop(connection, "full", "all connections are taken")

    def forget(self, connection: Connection) -> None:
        """Forget a connection that was lost."""
        if self.connections.pop(connection, None) is not None:
            self.addresses[connection.address] -= 1
            self.addresses += Counter()  # which drops the addresses without a connection

    def make_room(self, address: str | None = None) -> bool:
        """Close the oldest connection, of ``address`` or of all, that should have greeted by now; return True if there
        was one.
        """
        then = time.monotonic() - PATIENCE
        for connection, since in self.connections.items():
            if not connection.greeted and since < then and address in (None, connection.address):
                self.drop(connection, "greeting")
                return True
        return False

    def close_silent(self, seconds: float) -> None:
        """Close the connections that have not greeted within ``seconds``."""
        then = time.monotonic() - seconds
        silent = [each for each, since in self.connections.items() if not each.greeted and since < then]
        for connection in silent:
            self.drop(connection, "greeting")

    def exhausted(self) -> None:
        """Report that no file descriptor is left, and free one; asyncio accepts again in a second."""
        self.metrics.turned_away.labels("files").inc()
        self.log.warn("files", "no file descriptor is left for a new connection; allow more with `ulimit -n`")
        self.make_room()

    def drop(self, connection: Connection, reason: str, sentence: str = "") -> None:
        """Close a connection at once and count the reason."""
        self.metrics.turned_away.labels(reason).inc()
        if sentence:
            self.log.warn(reason, f"{sentence}; new ones are closed")
        self.forget(connection)
        connection.transport.abort()


class Connection(ServerConnection):
    """A connection that is read in pieces, so that a client that sends a lot is stopped early and delays nobody.

    Attributes:
        address: address by which the client is counted.
        greeted: True if the client has greeted, and so has a session.
        allowance: token bucket for frames that ask for no work.
    """

    def __init__(self, admission: Admission, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.admission, self.address, self.greeted = admission, "", False
        self.allowance = Allowance()
        self.unread = bytearray()

    def greet(self) -> None:
        """Accept messages as long as requests from now on."""
        self.greeted, self.protocol.max_message_size = True, self.admission.message

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.recv_messages.resume = self._resume
        self.protocol.max_message_size = min(HELLO, self.admission.message)
        peer = transport.get_extra_info("peername")
        self.address = client_address(str(peer[0])) if isinstance(peer, tuple) else str(peer)
        self.admission.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.unread.clear()
        super().connection_lost(exc)
        self.admission.forget(self)

    def data_received(self, data: bytes) -> None:
        self.unread += data
        self._read()

    def process_event(self, event: Any) -> None:
        if isinstance(event, Frame) and (event.opcode in (Opcode.PING, Opcode.PONG, Opcode.CONT) or not event.fin):
            if self.allowance.spend():
                self._stop("frames", "too many frames that ask for nothing")
            elif self.transport.get_write_buffer_size() > UNREAD:
                self._stop("unread", "answers are not read")
        super().process_event(event)

    def _read(self) -> None:
        """Parse pieces until enough messages wait."""
        while self.unread and not self.recv_messages.paused and not self.transport.is_closing():
            piece = bytes(self.unread[:PIECE])
            del self.unread[:PIECE]
            super().data_received(piece)

    def _resume(self) -> None:
        """Parse what was received before, then receive more."""
        self._read()
        if not self.recv_messages.paused:
            self.transport.resume_reading()

    def _stop(self, reason: str, sentence: str) -> None:
        """Send the reason and close the connection, soon also for a client that does not read it."""
        if not self.transport.is_closing():
            self.admission.metrics.turned_away.labels(reason).inc()
            self.protocol.fail(CloseCode.POLICY_VIOLATION, sentence)
            self.send_data()
            self.transport.close()
            self.loop.call_later(PATIENCE, self.transport.abort)
