"""The revision that results name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from spec_envs.experiments.measure import machine
from tests.support import ROOT


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_revision_is_dirty_if_code_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were just written do not make the next measurement's revision dirty."""
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "code" / "machine.py"))
    files = [tmp_path / name for name in ("code/machine.py", "docs/page.md", "README.md", "RESULTS.md")]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a\n")
    assert machine.revision() == "unknown"
    commit = ["-c", "user.name=n", "-c", "user.email=e@example.com", "commit", "-qm", "m"]
    for words in (["init", "-q"], ["add", "README.md"], commit):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert machine.revision() == "unknown"  # installed in a folder of another project
    for words in (["add", "."], commit):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = machine.revision()
    assert 7 <= len(clean) <= 40 and not clean.endswith("-dirty")
    for path in files[1:]:
        path.write_text("b\n")
    assert machine.revision() == clean
    files[0].write_text("b\n")
    assert machine.revision() == f"{clean}-dirty"


def test_revision_is_unknown_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.revision() == "unknown"


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and a clone")
def test_revision_of_a_clone_is_known() -> None:
    """The module is imported through a link to a folder."""
    assert machine.revision() != "unknown"
