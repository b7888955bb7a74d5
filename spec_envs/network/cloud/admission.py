"""Who may come in, and how much anybody may say that is no work: limits on connections before and beside requests."""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import Counter
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import CloseCode, Frame, Opcode

from spec_envs.network.cloud.log import Sparse
from spec_envs.network.cloud.metrics import Metrics

PIECE = 4096  # bytes that are read of a connection before others have their turn
HELLO = 4096  # bytes of a message before the greeting, which has less than a hundred
UNREAD = 4 * 2**20  # bytes of answers that wait for a client to read them; the longest has half of that
SPARE = 16  # connections beside those that edges may have: they look after health and metrics
PATIENCE = 1.0  # seconds for which even a full cloud waits for a greeting
CREDIT, REFILL, EARNED = 400.0, 50.0, 2.0  # frames without work: at once, per second, and for every answer
LOG = logging.getLogger(__name__)


class Allowance:
    """How many frames of a connection are read that ask for no work: pings, fragments, and messages said twice."""

    def __init__(self) -> None:
        self.left, self.at = CREDIT, time.monotonic()

    def earn(self) -> None:
        """Allow more for an answer: an edge measures round trips as it goes."""
        self.left = min(CREDIT, self.left + EARNED)

    def spend(self) -> float:
        """Return for how many seconds a frame should have waited; 0 if it is within the allowance."""
        now = time.monotonic()
        self.left = min(CREDIT, self.left + (now - self.at) * REFILL) - 1
        self.at = now
        return max(0.0, -self.left / REFILL)


def neighbourhood(host: str) -> str:
    """Return what stands for a client among addresses: of IPv6 the network of 64 bits, of which everybody has one."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class Door:
    """Counts connections from the moment that they are made.

    Args:
        most, per_address: connections at once, of all and of one address.
        message: bytes of a message after the greeting.
        metrics: count those that are turned away, by reason.
    """

    def __init__(self, most: int, per_address: int, message: int, metrics: Metrics):
        self.most, self.per_address, self.message, self.metrics = most, per_address, message, metrics
        self.inside: dict[Guest, float] = {}  # and since when
        self.addresses: Counter[str] = Counter()
        self.lines = Sparse(LOG)

    def guest(self, *arguments: Any, **settings: Any) -> Guest:
        """Make the connection of one client."""
        return Guest(self, *arguments, **settings)

    def enter(self, guest: Guest) -> None:
        """Let a connection in, or close it where there are too many."""
        self.inside[guest] = time.monotonic()
        self.addresses[guest.address] += 1
        if self.addresses[guest.address] > self.per_address and not self.make_room(guest.address):
            self.turn_away(guest, "address", "an address has all the connections that it may have")
        elif len(self.inside) > self.most and not self.make_room():
            self.turn_away(guest, "full", "all connections are taken")

    def leave(self, guest: Guest) -> None:
        """Forget a connection that was lost."""
        if self.inside.pop(guest, None) is not None:
            self.addresses[guest.address] -= 1
            self.addresses += Counter()  # without those of which none is left

    def make_room(self, address: str | None = None) -> bool:
        """Close the oldest connection, of an address or of all, that should have greeted by now; whether there was one."""
        then = time.monotonic() - PATIENCE
        for guest, since in self.inside.items():  # the oldest first
            if not guest.greeted and since < then and address in (None, guest.address):
                self.turn_away(guest, "greeting")
                return True
        return False

    def close_silent(self, seconds: float) -> None:
        """Close the connections that have not greeted for so long."""
        then = time.monotonic() - seconds
        for guest in [guest for guest, since in self.inside.items() if not guest.greeted and since < then]:
            self.turn_away(guest, "greeting")

    def exhausted(self) -> None:
        """There are no more file descriptors; asyncio tries again in a second."""
        self.metrics.turned_away.labels("files").inc()
        self.lines.warn("files", "no file descriptor is left for a new connection; allow more with `ulimit -n`")
        self.make_room()

    def turn_away(self, guest: Guest, reason: str, sentence: str = "") -> None:
        """Close a connection at once, and count why."""
        self.metrics.turned_away.labels(reason).inc()
        if sentence:
            self.lines.warn(reason, f"{sentence}; new ones are closed")
        self.leave(guest)
        guest.transport.abort()


class Guest(ServerConnection):
    """A connection that is read piece by piece, so that who sends a lot can be stopped, and holds nobody up.

    Attributes:
        address: of the client, as far as it counts.
        greeted: whether it has a session.
        allowance: of what it may say beside requests.
    """

    def __init__(self, door: Door, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.door, self.address, self.greeted = door, "", False
        self.allowance = Allowance()
        self.unread = bytearray()

    def greet(self) -> None:
        """Take the messages of an edge from now on."""
        self.greeted, self.protocol.max_message_size = True, self.door.message

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.recv_messages.resume = self._resume
        self.protocol.max_message_size = min(HELLO, self.door.message)
        peer = transport.get_extra_info("peername")
        self.address = neighbourhood(str(peer[0])) if isinstance(peer, tuple) else str(peer)
        self.door.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.unread.clear()
        super().connection_lost(exc)
        self.door.leave(self)

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
        """Read on until enough messages wait."""
        while self.unread and not self.recv_messages.paused and not self.transport.is_closing():
            piece = bytes(self.unread[:PIECE])
            del self.unread[:PIECE]
            super().data_received(piece)

    def _resume(self) -> None:
        """Read what came in before, and then what comes."""
        self._read()
        if not self.recv_messages.paused:
            self.transport.resume_reading()

    def _stop(self, reason: str, sentence: str) -> None:
        """Close the connection and say why; who does not read it is cut off."""
        if not self.transport.is_closing():
            self.door.metrics.turned_away.labels(reason).inc()
            self.protocol.fail(CloseCode.POLICY_VIOLATION, sentence)
            self.send_data()
            self.transport.close()
            self.loop.call_later(PATIENCE, self.transport.abort)
