"""Programs of the network as processes of their own, for as long as a block lasts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from spec_envs.processes import started

STOP_SECONDS = 5


@contextmanager
def running(module: str, *arguments: str) -> Iterator[str]:
    """Run a module's command, and yield the first line that it prints. The command ends with the block, and with this
    process, however that ends.

    Raises:
        ValueError: it ended before it printed anything; the message ends with the last line of its log.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = started(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            encoding="utf-8",
            env={**os.environ, "PYTHONUTF8": "1"},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            if not line:
                process.wait()
                log.seek(0)
                last = log.read().strip().splitlines()[-1:] or [f"status {process.returncode}"]
                raise ValueError(f"{module} ended while it started: {last[0].removeprefix('error: ')}")
            yield line
        finally:
            end(process)


@contextmanager
def cloud(*arguments: str) -> Iterator[str]:
    """Run a cloud on a free port of loopback, and yield its address."""
    with running("spec_envs.network.cloud", "--port", "0", "--grace", "1", *arguments) as line:
        yield line.removeprefix("listening on ")


@contextmanager
def behind(link: str, url: str) -> Iterator[str]:
    """Run a proxy on a free port that imitates a simulated link to the same cloud, and yield its address.

    Raises:
        ValueError: a cloud with TLS, whose certificate is not that of a proxy.
    """
    scheme, _, address = url.partition("://")
    if scheme != "ws":
        raise ValueError(f"the cloud's address is {url!r}; a simulated link needs one without TLS")
    proxy = running("spec_envs.network.proxy", "--listen", "0", "--to", address, "--link", link)
    with proxy as line:
        yield f"ws://{line.split()[0]}"


def end(process: subprocess.Popen[str]) -> None:
    """End a process, gently at first."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()
