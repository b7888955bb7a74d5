"""Loading and waiting for other processes are said where they take long, and only there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from spec_envs import waiting
from spec_envs.decoding.weights import checkpoints
from spec_envs.waiting import announced

LOG = logging.getLogger("test")


def when_said(act: Callable[[], object]) -> logging.Handler:
    """Return a handler that acts on every message."""
    handler = logging.Handler()
    handler.emit = lambda record: act()  # type: ignore[method-assign, assignment]
    return handler


def test_long_blocks_are_announced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with announced(LOG, "loading"):
        pass
    assert not caplog.messages and not [
        t for t in threading.enumerate() if isinstance(t, threading.Timer) and not t.finished.is_set()
    ]
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    said = threading.Event()
    logging.getLogger().addHandler(handler := when_said(said.set))  # after the one that notes messages
    with announced(LOG, "loading %s", "it"):
        assert said.wait(60)
    logging.getLogger().removeHandler(handler)
    assert caplog.messages == ["loading it"]


def test_waiting_for_another_process_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path)
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    target = tmp_path / "models" / "one"
    held, said = threading.Event(), threading.Event()

    def other() -> None:
        with FileLock(checkpoints.lock_of(target).lock_file):
            held.set()
            said.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(60)
    checkpoints.log.addHandler(handler := when_said(said.set))
    with checkpoints.cache_lock(target):
        assert said.is_set()
    checkpoints.log.removeHandler(handler)
    thread.join()
    assert caplog.messages == [f"waiting for another process, which makes {target}"]
