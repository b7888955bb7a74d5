"""A cloud in a separate process, and a proxy that can inject faults between it and its edges."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Self

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.frames import CloseCode

from spec_envs.network.cloud import __main__ as cloud

FORKS = multiprocessing.get_context("forkserver")  # has finished its imports, which take most of the start-up time
FORKS.set_forkserver_preload(["spec_envs.network.cloud", "tests.support.cloud_process", "spec_envs.agents"])
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Fault = Callable[[int, str, Any], Awaitable[list[Any] | None]]


def run(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Run a cloud as `python -m spec_envs.network.cloud` does, with its output in a file."""
    os.environ.update(environment)
    with Path(output).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["cloud", *arguments]
    cloud.main()


class CloudProcess:
    """A cloud that can be killed and started again on its port.

    Args:
        folder: the folder of its output.
        arguments: command-line arguments without the port.
        environment: its environment variables.
    """

    def __init__(self, folder: Path, *arguments: str, **environment: str):
        self.output, self.arguments = folder / f"cloud-{time.monotonic_ns()}", ["--threads", "1", *arguments]
        self.environment, self.port = {cloud.TOKEN: ""} | environment, 0
        self.launch()

    def launch(self) -> None:
        """Start the process without waiting until it listens."""
        arguments = ["--port", str(self.port), *self.arguments]
        self.process = FORKS.Process(target=run, args=(arguments, self.environment, str(self.output)), daemon=True)
        self.output.unlink(missing_ok=True)
        self.process.start()

    def listening(self) -> Self:
        """Wait until the cloud listens, and return it."""
        begin = time.monotonic()
        while "listening on " not in self.printed:
            assert self.process.is_alive() and time.monotonic() - begin < 60, self.printed
            time.sleep(0.01)
        self.url = self.printed.split("listening on ")[1].split()[0]
        self.port = int(self.url.rpartition(":")[2])
        return self

    @property
    def printed(self) -> str:
        """Return the output of the cloud so far."""
        return self.output.read_text() if self.output.exists() else ""

    def end(self, timeout: float = 30) -> int | None:
        """Wait for the process to end; return its exit status, or None if it does not end in time."""
        self.process.join(timeout)
        return self.process.exitcode

    def restart(self) -> None:
        """Kill the process, and start a new one on the same port."""
        self.process.kill()
        self.end()
        self.launch()
        self.listening()

    @property
    def resident(self) -> int:
        """Return the resident memory of the process in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def page(self, path: str, **headers: str) -> tuple[int, str]:
        """Return the status and text of a plain HTTP GET."""
        request = urllib.request.Request(f"http{self.url.removeprefix('ws')}{path}", headers=headers)
        try:
            with DIRECT.open(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Return the value of a metric without labels."""
        lines = self.page("/metrics")[1].splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"spec_envs_cloud_{name} "))

    def __enter__(self) -> Self:
        return self.listening()

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.end()


class FaultProxy:
    """Proxy WebSocket connections on a separate thread; every message goes through ``fault``.

    Args:
        to: the cloud's address.

    Attributes:
        fault: called with the message's number over all connections, its source (``edge`` or ``cloud``) and the
            message; returns the messages to pass on, or None to cut the connection.
        passed: number of messages so far.
    """

    def __init__(self, to: str):
        self.to = to
        self.reset(pass_unchanged)

    def reset(self, fault: Fault) -> None:
        """Set the fault, and count messages from zero."""
        self.fault, self.passed = fault, 0

    async def _connected(self, edge: ServerConnection) -> None:
        with contextlib.suppress(OSError, ConnectionClosed, InvalidHandshake):
            async with connect(self.to, compression=None, max_size=None, ping_interval=None, proxy=None) as up:
                ways = [asyncio.create_task(self._pass(*way)) for way in ((edge, up, "edge"), (up, edge, "cloud"))]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                up.transport.abort()
        edge.transport.abort()

    async def _pass(self, source: Any, target: Any, name: str) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                frame = await source.recv()
                self.passed += 1
                frames = await self.fault(self.passed, name, frame)
                if frames is None:
                    return
                for each in frames:
                    await target.send(each)
        if source.close_code != CloseCode.ABNORMAL_CLOSURE:
            await target.close(source.close_code, source.close_reason)

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        async with serve(
            self._connected, "127.0.0.1", 0, compression=None, max_size=None, ping_interval=None, close_timeout=0.1
        ) as server:
            self.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            yield

    def __enter__(self) -> Self:
        self.loop, ready = asyncio.new_event_loop(), threading.Event()
        self.stop = asyncio.Event()

        async def main() -> None:
            async with self._serving():
                ready.set()
                await self.stop.wait()

        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(main(),), daemon=True)
        self.thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)


async def pass_unchanged(number: int, source: str, frame: Any) -> list[Any] | None:
    """Return the message unchanged."""
    return [frame]
