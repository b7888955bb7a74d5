"""Started processes end with this process, and not before."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from spec_envs.processes import started
from tests.support.processes import alive

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux ends the children of a process that is gone")


def ended(process: int) -> bool:
    """Return True if the process ends within seconds."""
    for _ in range(200):
        if not alive(process):
            return True
        time.sleep(0.05)
    return False


def test_process_outlives_starting_thread() -> None:
    found: list[subprocess.Popen[str]] = []

    def start() -> None:
        found.append(started(SLEEP, stdout=subprocess.PIPE, text=True))
        assert found[0].stdout is not None and found[0].stdout.readline() == "up\n"

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    time.sleep(0.5)
    assert found[0].poll() is None and alive(found[0].pid)
    found[0].kill()
    assert found[0].wait() == -9
    assert found[0].stdout is not None
    found[0].stdout.close()


@pytest.mark.parametrize("started_by", ["the process", "a fork of it"])
def test_process_ends_with_its_parent(started_by: str) -> None:
    code = (
        "import os, sys, time\n"
        "from spec_envs.processes import started\n"
        f"command = {SLEEP!r}\n"
        "first = started(command)\n"
        "if sys.argv[1] == 'a fork of it' and os.fork():\n"
        "    first.kill()\n"
        "    os.wait()\n"
        "    sys.exit()\n"
        "print('server', started(command).pid, flush=True)\n"
        "time.sleep(0.2)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    parent = subprocess.run([sys.executable, "-c", code, started_by], capture_output=True, text=True, timeout=60)
    server = int(parent.stdout.split("server ")[1].split()[0])
    assert ended(server)


def test_missing_program_raises_in_the_caller() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        started(["/nowhere/program"])
