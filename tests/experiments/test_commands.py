"""Every command has help, refuses bad arguments in one line, and writes nothing when it refuses."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_envs.arguments import Parser, input_file, input_folder, number, output_file, output_folder, whole_number
from spec_envs.experiments.video import video_file
from tests.support import ROOT

MODULES = sorted(
    ".".join((*(["spec_envs"] if folder == "experiments" else []), *path.relative_to(ROOT).with_suffix("").parts))
    for folder in ("experiments", "spec_envs/network")
    for path in (ROOT / folder).rglob("*.py")
    if "\ndef main(" in path.read_text(encoding="utf-8")
)
NONSENSE = ("", "x", "nan", "inf", "1e999", "-1", "１", "0x10", "1,5", "[]")


class Parsed(Exception):
    """Carry a parser out of ``parse_args``."""


def command(name: str) -> ModuleType:
    return importlib.import_module(name)


def parser_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Parser:
    """Return the parser of a command, taken when it is about to parse."""

    def caught(self: Parser, *_: Any) -> None:
        raise Parsed(self)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", caught)
        with pytest.raises(Parsed) as found:
            command(name).main()
    return found.value.args[0]


def error_line(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the one-line error with which a command exits."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    errors = io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(errors):
        command(name).main()
    code = ended.value.code
    line = code if isinstance(code, str) else errors.getvalue().strip()
    assert code and line.startswith("error: ") and "\n" not in line, line
    return line


def expects_number(action: argparse.Action) -> bool:
    """Return True if an option expects a number."""
    if action.type is None or not callable(action.type):
        return False
    try:
        action.type("x")
    except (argparse.ArgumentTypeError, ValueError):
        return action.type.__name__ == "parse"
    return False


def test_known_commands_are_found() -> None:
    experiments = {"train", "evaluate", "tune", "traces.record", "drafters", "benchmark", "checks.zoo", "checks.chaos"}
    ours = {f"spec_envs.experiments.{name}" for name in experiments}
    ours |= {f"spec_envs.network.{name}" for name in ("cloud", "edge", "proxy")}
    assert ours <= {name.removesuffix(".__main__") for name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_help_shows_usage_and_description(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        command(name).main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ") and str(command(name).__doc__).split()[0] in shown


@pytest.mark.parametrize("name", MODULES)
def test_invalid_values_are_refused_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = parser_of(name, monkeypatch)
    assert "--no-such-option" in error_line(name, ["--no-such-option"], monkeypatch) or "required" in error_line(
        name, ["--no-such-option"], monkeypatch
    )
    for action in parser._actions:
        if action.option_strings and expects_number(action):
            for value in NONSENSE:
                line = error_line(name, [f"{action.option_strings[0]}={value}"], monkeypatch)
                assert action.option_strings[0] in line
        if action.choices and action.option_strings:
            assert action.option_strings[0] in error_line(name, [action.option_strings[0], "nonsense"], monkeypatch)
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_every_option_has_a_range(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare int or float would accept NaN, and numbers outside any sensible range."""
    for action in parser_of(name, monkeypatch)._actions:
        assert action.type not in (int, float), action.option_strings


@pytest.mark.parametrize("name", MODULES)
def test_unwritable_outputs_are_refused_before_any_work(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    too_long = str(tmp_path / ("x" * 300))
    for action in parser_of(name, monkeypatch)._actions:
        if action.option_strings and action.type in (output_folder, output_file, video_file):
            line = error_line(name, [action.option_strings[0], too_long], monkeypatch)
            assert line.endswith("cannot be written: File name too long; --help describes every option")
        if action.option_strings and action.type in (input_folder, input_file):
            assert "is not a f" in error_line(name, [action.option_strings[0], too_long], monkeypatch)
        if action.type is output_folder:
            for path in (tmp_path / "file", tmp_path / "file" / "below"):
                assert "is a file" in error_line(name, [action.option_strings[0], str(path)], monkeypatch)
        if action.type is output_file:
            assert "is a folder" in error_line(name, [action.option_strings[0], str(tmp_path / "folder")], monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_home_folder_is_known_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shells replace ``~`` in ``--out ~/x``, but not in ``--out=~/x``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert output_folder("~/new") == tmp_path / "new" and output_file("~/new/a") == tmp_path / "new" / "a"
    assert input_folder("~") == tmp_path and input_file("~/file") == tmp_path / "file"


def test_set_options_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second ``--set`` is added to the first."""
    monkeypatch.setattr(sys, "argv", ["train", "SpecK-v0", "--set", "a=1", "--set", "b=2", "c=3"])
    assert command("spec_envs.experiments.train").arguments().set == ["a=1", "b=2", "c=3"]
    monkeypatch.setattr(sys, "argv", ["train", "SpecK-v0"])
    assert command("spec_envs.experiments.train").arguments().set == []


def test_abbreviated_options_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--promp" in error_line("spec_envs.experiments.evaluate", ["runs", "--promp", "gsm8k"], monkeypatch)
    assert "unrecognized arguments: runs/b" in error_line(
        "spec_envs.experiments.evaluate", ["runs/a", "runs/b"], monkeypatch
    )


@pytest.mark.fuzz
@given(st.text(max_size=8) | st.floats().map(str) | st.integers().map(str))
def test_numbers_are_finite_and_in_range(text: str) -> None:
    for parse, lowest, highest in (
        (whole_number(1), 1, math.inf),
        (whole_number(0, 7), 0, 7),
        (number(0, 1), 0, 1),
        (number(0, above=True), 1e-320, math.inf),
    ):
        try:
            value = parse(text)
        except argparse.ArgumentTypeError as error:
            assert "\n" not in str(error)
        else:
            assert lowest <= value <= highest and math.isfinite(value)
