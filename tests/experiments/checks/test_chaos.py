"""A short version of `make chaos`, and that it detects commands that do not continue."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec_envs.experiments.checks.chaos import tried
from spec_envs.experiments.checks.chaos_cases import CASES, Case, digests

WRITER = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)
count = folder / 'count'
{begin}
for _ in range(10):
    count.write_text(count.read_text() + 'x' if count.exists() else 'x')
    time.sleep(0.1)
"""


def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str) -> Case:
    """Return a case whose command takes a second and appends to the file that it finds."""
    (tmp_path / "writer_case.py").write_text(WRITER.format(begin=begin))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Case("writer", "writer_case {}", lambda folder: digests(folder, "count"))


@pytest.mark.parametrize(("name", "kills"), [("tune", 2), ("train-ppo", 1)])
def test_killed_commands_continue(name: str, kills: int, tmp_path: Path) -> None:
    result = tried(CASES[name], tmp_path / name, kills, seed=0)
    assert (result.failed, result.kills) == ("", kills) and result.ends


def test_commands_that_do_not_continue_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tried(writer(tmp_path, monkeypatch, "count.unlink(missing_ok=True)"), tmp_path / "starts-over", 2, seed=0)
    assert result.failed == "" and result.kills == 2
    slow = "count.unlink(missing_ok=True); time.sleep(3 * ('undisturbed' in str(folder)))"
    result = tried(writer(tmp_path, monkeypatch, slow), tmp_path / "slow-at-first", 1, seed=0)
    assert result.failed == "" and result.kills == 1
    result = tried(writer(tmp_path, monkeypatch, ""), tmp_path / "twice", 2, seed=0)
    assert "differs from the undisturbed run in count" in result.failed
    result = tried(
        writer(tmp_path, monkeypatch, "assert not count.exists(), 'left over'"), tmp_path / "fails", 2, seed=0
    )
    assert "it ended with 1: AssertionError: left over" in result.failed
    result = tried(writer(tmp_path, monkeypatch, "raise OSError('no')"), tmp_path / "never", 2, seed=0)
    assert result.failed == "undisturbed, it ends with 1: OSError: no"
