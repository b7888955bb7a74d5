"""The revision that results name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from spec_envs.experiments.measure import machine


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_revision_is_dirty_if_code_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were just written do not make the next measurement's revision dirty."""
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "code" / "machine.py"))
    files = [tmp_path / name for name in ("code/machine.py", "docs/page.md", "README.md")]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a\n")
    assert machine.revision() == "unknown"
    commit = ["-c", "user.name=n", "-c", "user.email=e@example.com", "commit", "-qm", "m"]
    for words in (["init", "-q"], ["add", "."], commit):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = machine.revision()
    assert 7 <= len(clean) <= 40 and not clean.endswith("-dirty")
    for path in files[1:]:
        path.write_text("b\n")
    assert machine.revision() == clean
    files[0].write_text("b\n")
    assert machine.revision() == f"{clean}-dirty"
