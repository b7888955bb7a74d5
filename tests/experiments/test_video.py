"""The command that makes a video of an environment."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from spec_envs.experiments import video
from tests.support.commands import run_command
from tests.support.runs import Run

PROFILE = ("SpecK-v0", "--agent", "fixed", "--set", "env.trace=qwen2.5-coder-32b-cpu", "--max-new-tokens", 24)


def settings(tiny: dict[str, Any], **more: Any) -> list[str]:
    """Return overrides for an environment of the tiny models."""
    return [f"env.{name}={value}" for name, value in {**tiny, **more}.items() if name != "max_new_tokens"]


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        run_command(monkeypatch, video, *arguments)
    line = str(ended.value.code)
    assert line.startswith("error: ") and "\n" not in line
    return line


def test_profile_is_recorded_as_gif(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "k.gif"
    run_command(monkeypatch, video, *PROFILE, "--fps", 4, "--out", out)
    image = Image.open(out)
    lengths = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    assert image.size == (800, 480) and image.info["loop"] == 0
    assert lengths[0] == 250 and lengths[-1] == 1500 and set(lengths[1:-1]) == {500}
    assert out.stat().st_size < 1_000_000 and f"{len(lengths)} pictures" in capsys.readouterr().out
    first = out.read_bytes()
    run_command(monkeypatch, video, *PROFILE, "--fps", 4, "--out", out)
    assert out.read_bytes() == first


def test_profile_is_recorded_as_mp4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "k.mp4"
    run_command(monkeypatch, video, *PROFILE, "--out", out)
    assert b"ftyp" in out.read_bytes()[:16]


def test_shipped_agent_plays_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    out = tmp_path / "tree.gif"
    given = ("--prompt", "the a of", "--max-new-tokens", 8, "--out", out)
    run_command(monkeypatch, video, "SpecTree-v0", *given, "--set", *settings(tiny))
    assert Image.open(out).n_frames > 2  # type: ignore[attr-defined]


def test_untrained_exit_and_fixed_choice_play(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    exit = settings(tiny, drafter="auto", block=3)
    run_command(monkeypatch, video, "SpecDVI-v0", "--max-new-tokens", 6, "--set", *exit)
    run_command(monkeypatch, video, "SpecTopK-v0", "--max-new-tokens", 6, "--set", *settings(tiny, drafter="lookup"))
    several = settings(tiny, drafter="lookup,suffix")
    run_command(monkeypatch, video, "SpecDrafter-v0", "--agent", "hedge", "--max-new-tokens", 6, "--set", *several)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["SpecDVI-v0.gif", "SpecDrafter-v0.gif", "SpecTopK-v0.gif"]


@pytest.mark.parametrize("fps", [0.1, 50])
def test_slowest_and_fastest_videos_are_written(fps: float) -> None:
    """The durations of a GIF are numbers of 16 bits."""
    frames = [video.Frame(np.full((2, 2, 3), shade, np.uint8), video.HELD_LAST) for shade in (0, 255)]
    image = Image.open(io.BytesIO(video.gif(frames, fps)))
    assert [frame.info["duration"] for frame in ImageSequence.Iterator(image)] == [video.HELD_LAST * 1000 / fps] * 2


@pytest.mark.parametrize("name", ["ppo", "dvi"])
def test_runs_play(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_runs: dict[str, Run]) -> None:
    folder, out = tmp_path / "run", tmp_path / "run.gif"
    small_runs[name].train(folder)
    run_command(monkeypatch, video, small_runs[name].env_id, "--run", folder, "--max-new-tokens", 6, "--out", out)
    assert out.exists()
    assert "is a run of Spec" in refusal(monkeypatch, "SpecDepth-v0", "--run", folder)


def test_colours_are_those_of_the_picture() -> None:
    picture = np.array([[[255, 255, 255], [0, 114, 178]], [[1, 115, 178], [184, 74, 0]]], np.uint8)
    frames = [video.Frame(picture, 1), video.Frame(picture[::-1], 2)]
    image = Image.open(io.BytesIO(video.gif(frames, 2)))
    assert np.array_equal(np.asarray(image.convert("RGB")), picture)


def test_bad_input_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no environment 'SpecT-v0'" in refusal(monkeypatch, "SpecT-v0")
    assert "has no stanza 'rando' (did you mean 'random'" in refusal(monkeypatch, "SpecK-v0", "--agent", "rando")
    assert "'hyperparameters.value=3' would change the trained agent" in refusal(
        monkeypatch, "SpecK-v0", "--set", "hyperparameters.value=3"
    )
    assert "has prompts of its own" in refusal(monkeypatch, *PROFILE, "--prompt", "the a")
    assert "ppo has to be trained first" in refusal(
        monkeypatch, "SpecDepth-v0", "--agent", "ppo-live", "--set", *settings(tiny)
    )
    assert "is not a readable run folder" in refusal(monkeypatch, "SpecK-v0", "--run", tmp_path)
    assert "give --agent or --run, not both" in refusal(monkeypatch, "SpecK-v0", "--agent", "random", "--run", tmp_path)
    with pytest.raises(SystemExit):
        run_command(monkeypatch, video, "SpecK-v0", "--out", "video.avi")
    assert "--out is 'video.avi'; expected a name that ends in .gif or .mp4" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs moviepy" in refusal(monkeypatch, "SpecK-v0", "--out", "video.mp4")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out
