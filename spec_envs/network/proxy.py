"""A TCP proxy that gives a real connection the rate and the delay of a simulated link:
`spec-envs proxy --listen 8766 --to 127.0.0.1:8765 --link markov-1-500`.

Bytes pass the token bucket of their direction and arrive half a round trip later. Nothing is lost: the ``loss`` of a
link is used only where its seconds are computed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np

from spec_envs.arguments import SEED, Parser
from spec_envs.network.link import LINKS, LITERAL, PACKET, Link, load_link

LOG = logging.getLogger(__name__)
BURST = 0.002  # seconds whose bytes an idle direction may send at once, because timers are imprecise
CHUNK_SECONDS, CHUNK = 0.01, 65536  # most seconds and most bytes of a chunk
CHUNKS = 1024  # chunks on their way in one direction before it stops reading
Chunks = asyncio.Queue[tuple[float, bytes]]  # time of delivery and bytes; empty bytes are the end


class Direction:
    """One direction of the link, a token bucket that all connections share.

    Args:
        rate: returns the present rate in bytes per second.
    """

    def __init__(self, rate: Callable[[], float]):
        self.rate = rate
        self.free = 0.0  # time at which all bytes so far have left

    @property
    def chunk(self) -> int:
        """Number of bytes to read at a time, so small that a change of the rate soon takes effect."""
        return int(np.clip(self.rate() * CHUNK_SECONDS, PACKET, CHUNK))

    async def send(self, size: int) -> None:
        """Wait until the last of ``size`` bytes has left."""
        now = asyncio.get_running_loop().time()
        self.free = max(self.free, now - BURST) + size / self.rate()
        if self.free > now:
            await asyncio.sleep(self.free - now)


class ShapedProxy:
    """Forwards every connection to one address over a simulated link; the side that connects is the edge.

    It is started and stopped by ``with`` (in a thread of its own) or ``async with``.

    Args:
        link: gives rate and delay; it is reset at the start.
        to: host and port of the server.
        listen: host and port to listen on; port 0 takes a free one.
        seed: seed of the link's states and jitter.
        interval: seconds after which the link's state moves.

    Attributes:
        port: the port it listens on.
    """

    def __init__(
        self,
        link: Link,
        to: tuple[str, int],
        listen: tuple[str, int] = ("127.0.0.1", 0),
        seed: int = 0,
        interval: float = 0.2,
    ):
        self.link, self.to, self.listen, self.seed, self.interval = link, to, listen, seed, interval
        self.port = listen[1]
        self.tasks: set[asyncio.Task[None]] = set()
        self.up, self.down = Direction(lambda: link.state.up), Direction(lambda: link.state.down)

    async def __aenter__(self) -> Self:
        self.link.reset(np.random.default_rng(self.seed))
        try:
            self.server = await asyncio.start_server(self._connected, *self.listen)
        except OSError as error:
            host, port = self.listen
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
            raise OSError(f"could not listen on {host}:{port} ({reason}); choose another address") from None
        self.port = self.server.sockets[0].getsockname()[1]
        self._keep(asyncio.create_task(self._move()))
        return self

    async def __aexit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close on the next turn of the loop

    def __enter__(self) -> Self:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="shaped-proxy", daemon=True)
        self.thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self.__aenter__(), self.loop).result()
        except BaseException:
            self._end_thread()
            raise

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self.__aexit__(), self.loop).result()
        self._end_thread()

    def _end_thread(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def _keep(self, task: asyncio.Task[None]) -> None:
        """Keep a reference to a task until it is done."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _move(self) -> None:
        """Move the link's state at every interval, whether anything is sent or not."""
        while True:
            await asyncio.sleep(self.interval)
            self.link.move()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward a new connection."""
        self._keep(asyncio.create_task(self._forward(reader, writer)))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward until both sides have ended, or one has failed."""
        up: Chunks = asyncio.Queue(CHUNKS)
        down: Chunks = asyncio.Queue(CHUNKS)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self.to)
        except OSError as error:
            LOG.warning("no connection to %s:%d (%s); is the server running?", *self.to, error)
            writer.transport.abort()
            return
        writers = (writer, far_writer)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._take(reader, self.up, up))
                group.create_task(deliver(up, far_writer))
                group.create_task(self._take(far_reader, self.down, down))
                group.create_task(deliver(down, writer))
            for each in writers:
                each.close()
        except* OSError:
            pass  # the connection to the other side is aborted below
        finally:
            for each in writers:
                if not each.is_closing():
                    each.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, direction: Direction, chunks: Chunks) -> None:
        """Read bytes at the rate of their direction and queue them with their time of arrival, in order.

        They arrive after half a round trip and half the jitter. The jitter is drawn for every message, which is assumed
        to begin when no earlier bytes are on their way.
        """
        loop, arrival, jitter = asyncio.get_running_loop(), 0.0, 0.0
        while data := await reader.read(direction.chunk):
            if arrival <= loop.time():
                jitter = self.link.jitter() / 2
            await direction.send(len(data))
            arrival = max(arrival, loop.time() + self.link.state.rtt / 2 + jitter)
            await chunks.put((arrival, data))
        await chunks.put((max(arrival, loop.time() + self.link.state.rtt / 2), b""))


async def deliver(chunks: Chunks, writer: asyncio.StreamWriter) -> None:
    """Write chunks at their time of arrival, up to the empty one that ends the direction."""
    loop = asyncio.get_running_loop()
    while True:
        arrival, data = await chunks.get()
        if (wait := arrival - loop.time()) > 0:
            await asyncio.sleep(wait)
        if not data:
            writer.write_eof()
            return
        writer.write(data)
        await writer.drain()


def address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``, or of ``PORT`` on loopback."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5) or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address; expected PORT or HOST:PORT")
    return host or "127.0.0.1", int(port)


def server(text: str) -> tuple[str, int]:
    """Return host and port of an address to connect to, whose port is not 0."""
    host, port = address(text)
    if port == 0:
        raise argparse.ArgumentTypeError(f"is {text}; expected a port from 1 to 65535")
    return host, port


def milliseconds(text: str) -> float:
    """Return the seconds of a positive time in milliseconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; expected 1 to 1e9 milliseconds")
    return value / 1e3


def arguments() -> argparse.Namespace:
    parser = Parser(
        "A TCP proxy that gives connections the rate and the delay of a simulated link.",
        epilog="Example: --listen 8766 --to 127.0.0.1:8765 --link markov-1-500. The side that connects to --listen is "
        "the edge: its bytes go up. All connections share the rate of a direction; packet loss is not simulated.",
    )
    parser.add_argument(
        "--listen", type=address, required=True, metavar="[HOST:]PORT", help="where to listen (host: loopback)"
    )
    parser.add_argument("--to", type=server, required=True, metavar="[HOST:]PORT", help="the server to forward to")
    shipped = ", ".join(sorted(path.stem for path in LINKS.glob("*.json")))
    parser.add_argument(
        "--link", required=True, help=f"{shipped}; a JSON file; a .csv of ms,mbps; or a literal {LITERAL}"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of states and jitter (default: 0)")
    parser.add_argument(
        "--interval-ms",
        type=milliseconds,
        default="200",
        dest="interval",
        metavar="MS",
        help="time after which the link's state moves (default: 200)",
    )
    return parser.parse_args()


async def run(proxy: ShapedProxy) -> None:
    """Print the addresses and forward until interrupted."""
    async with proxy:
        print(f"{proxy.listen[0]}:{proxy.port} → {proxy.to[0]}:{proxy.to[1]} over {proxy.link.name}", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    args = arguments()
    try:
        link = load_link(args.link)
        asyncio.run(run(ShapedProxy(link, args.to, args.listen, args.seed, args.interval)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
