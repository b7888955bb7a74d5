"""Files are written completely or not at all, and a folder is held by one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spec_envs.files import LOCK, held, read_json, whole, write_bytes, write_json
from tests.support import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from spec_envs.files import held
with held(Path(sys.argv[1])):
    (Path(sys.argv[1]) / "mine").write_text("")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Yield another process that holds ``folder``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "folder")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_held_folder_is_free_after_its_holder_ends(other: subprocess.Popen, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    refused = pytest.raises(
        ValueError, match=rf"folder is in use by process {other.pid} on .*; wait until it has ended"
    )
    with refused, held(folder):
        pytest.fail("two processes hold the folder")
    other.send_signal(signal.SIGKILL)
    other.wait()
    (folder / "policy.tmp").write_text("what a killed process leaves")
    with held(folder):
        assert not (folder / "policy.tmp").exists()
    assert (folder / "mine").exists()


def test_folder_that_cannot_be_made_is_named() -> None:
    sentence = "could not make the folder /proc/x: .*; choose another folder"
    with pytest.raises(OSError, match=sentence), held(Path("/proc/x")):
        pytest.fail("nothing can be made there")


def test_waiting_process_reports_holder_and_continues_after_it(
    other: subprocess.Popen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from spec_envs.files import held\n"
            "with held(Path(sys.argv[1]), 'recording a trace'): print('mine')",
            str(tmp_path / "folder"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert waiting.stderr is not None
    assert waiting.stderr.readline().startswith(f"waiting for process {other.pid} on ")
    assert waiting.poll() is None
    other.send_signal(signal.SIGKILL)
    assert waiting.communicate(timeout=60)[0] == "mine\n"


def test_empty_held_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with held(folder):
        assert (folder / LOCK).read_text().startswith(f"process {os.getpid()}")
    assert not folder.exists()
    with held(folder), pytest.raises(ValueError, match="in use by process"), held(folder):
        pass
    with held(folder):
        (folder / "something").write_text("")
    with held(folder):
        pass
    assert sorted(path.name for path in folder.iterdir()) == [LOCK, "something"]


def test_file_is_synced_before_and_after_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure after the rename must not leave an empty file."""
    calls: list[tuple[str, str]] = []
    sync = os.fsync

    def fsync(handle: int) -> None:
        calls.append(("sync", Path(f"/dev/fd/{handle}").resolve().name))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    rename = Path.replace

    def replace(path: Path, target: Path) -> Path:
        calls.append(("rename", Path(target).name))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    write_bytes(tmp_path / "file", b"data")
    assert calls == [("sync", "file.tmp"), ("rename", "file"), ("sync", tmp_path.name)]


def test_failed_write_leaves_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), whole(path) as temporary:
        temporary.write_bytes(b"ne")
        raise KeyboardInterrupt
    full = pytest.raises(OSError, match=r"could not write .*file: No space left on device; free some space")
    with full, whole(path):
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_with_non_finite_numbers_is_refused(number: float, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    with pytest.raises(ValueError, match=r"could not write .*figures.json: .*expected finite numbers"):
        write_json(path, {"a": [number]})
    assert not path.exists()
    path.write_text(json.dumps({"a": [number]}))
    with pytest.raises(ValueError, match=r"figures.json is damaged .*is not a finite number.*; measure again"):
        read_json(path, "measure again")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b'{"a": 1e999}', b"9" * 5000])
def test_damaged_json_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pace.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S*pace.json is damaged \([^\n]*\); delete it$"):
        read_json(path, "delete it")
    with pytest.raises(ValueError, match=r"^cannot read .*none.json: No such file or directory; delete it$"):
        read_json(tmp_path / "none.json", "delete it")
