"""Tuning resumes wherever it was interrupted, and ends with the same settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spec_envs.experiments import tune
from spec_envs.files import held

SETTINGS = ["env.trace=qwen2.5-coder-32b-cpu", "env.decision=token"]
TRIALS = 14  # the last four are drawn by the values of the others


def tuned(root: Path, trials: int = TRIALS, **changes: int) -> Path:
    sizes = {"prompts": 2, "tokens": 24} | changes
    tune.tune("SpecK-v0", "svip", SETTINGS, trials, sizes["prompts"], sizes["tokens"], root)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tmp_path_factory.mktemp("whole") / "svip")


def test_writes_settings_and_removes_temporary_files(whole: Path) -> None:
    assert {"best.yml", "clock.json", "history.png", "settings.json", "study.log"} < {p.name for p in whole.iterdir()}
    assert not list(whole.glob("*.tmp")) and not list(whole.glob("study.log.*"))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.37, 0.99])
def test_tuning_resumes_from_truncated_journal(
    share: float, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is cut off anywhere, and Optuna's own lock remains from another version with a target that does
    not exist here."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/svip")
    folder.mkdir(parents=True)
    journal = (whole / "study.log").read_bytes()
    (folder / "study.log").write_bytes(journal[: round(share * len(journal))])
    for name in ("settings.json", "clock.json"):
        (folder / name).write_bytes((whole / name).read_bytes())
    (folder / "study.log.lock").symlink_to("runs/svip/study.log")
    (folder / "study.log.lock1234.rename").symlink_to("runs/svip/study.log")
    (folder / "best.yml.tmp").write_text("cut sh")
    tuned(folder)
    assert (folder / "best.yml").read_bytes() == (whole / "best.yml").read_bytes()
    assert not [path.name for path in folder.iterdir() if path.name.startswith("study.log.") or path.suffix == ".tmp"]
    assert len(tune.finished(tune.opened(folder))) == TRIALS


def test_trials_in_several_calls_give_same_result(tmp_path: Path, whole: Path) -> None:
    for trials in (1, 3, TRIALS):
        tuned(tmp_path / "svip", trials)
    assert (tmp_path / "svip" / "best.yml").read_bytes() == (whole / "best.yml").read_bytes()


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    with held(tmp_path / "svip"), pytest.raises(ValueError, match=rf"svip is in use by process {os.getpid()}"):
        tuned(tmp_path / "svip", 1)


def test_folders_with_other_or_damaged_content_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was begun with another tokens; choose another --root, or delete it"):
        tuned(whole, tokens=25)
    folder = tuned(tmp_path / "svip", 1)
    (folder / "study.log").write_bytes(b"nonsense\n" + (folder / "study.log").read_bytes())
    with pytest.raises(ValueError, match=r"study.log is damaged \(.*\); delete .*svip to tune again"):
        tuned(folder, 2)
    (folder / "settings.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"settings.json is damaged \(it is nested too deeply\); delete "):
        tuned(folder, 2)
    (other := tmp_path / "other").mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"other holds something else, thesis.tex; choose another --root"):
        tuned(other, 1)
    assert [path.name for path in other.iterdir() if path.suffix != ".lock" and path.name != ".lock"] == ["thesis.tex"]


def test_refused_stanza_leaves_no_folder(tmp_path: Path) -> None:
    for stanza, settings in (("ppo", SETTINGS), ("svip", [*SETTINGS, "env.prompts=gsm9k", "env.trace=null"])):
        with pytest.raises(ValueError, match=r"has nothing to tune here|no prompt set gsm9k"):
            tune.tune("SpecK-v0", stanza, settings, 1, 2, 24, tmp_path / stanza)
        assert not (tmp_path / stanza).exists()
