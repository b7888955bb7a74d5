"""Commands of the network that run as processes while a block runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from spec_envs.processes import started

STOP_SECONDS = 5


@contextmanager
def running(module: str, *arguments: str) -> Iterator[str]:
    """Run a module's command, and yield the first line that it prints. The command is ended with the block, and with
    this process in any case.

    Raises:
        ValueError: the command ended before it printed anything; the message ends with the last line of its log.
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
            line = output(process).readline().strip()
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
def over_link(link: str, url: str) -> Iterator[str]:
    """Run a proxy that imitates a simulated link to a cloud, and yield its address.

    Raises:
        ValueError: the cloud uses TLS, whose certificate does not fit a proxy.
    """
    scheme, _, address = url.partition("://")
    if scheme != "ws":
        raise ValueError(f"the cloud's address is {url!r}; a simulated link needs one without TLS")
    proxy = running("spec_envs.network.proxy", "--listen", "0", "--to", address, "--link", link)
    with proxy as line:
        yield f"ws://{line.split()[0]}"


def output(process: subprocess.Popen[str]) -> IO[str]:
    """Return the pipe from the standard output of a process."""
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe for its output")
    return process.stdout


def end(process: subprocess.Popen[str]) -> None:
    """End a process with SIGTERM, or with SIGKILL if it does not end in time."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    output(process).close()
