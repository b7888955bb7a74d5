"""The command ``spec-envs``: its table, its help without heavy imports, and how it calls the commands' modules."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from spec_envs import ENVIRONMENTS, __version__, cli

HEAVY = {"torch", "transformers", "stable_baselines3", "scipy", "matplotlib"}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, list[str]]]:
    """Return a function that runs the command with a stand-in for the modules: their ``main`` records ``sys.argv``."""

    def call(*words: str) -> tuple[str, list[str]]:
        found: list[tuple[str, list[str]]] = []

        def stand_in(module: str) -> SimpleNamespace:
            return SimpleNamespace(main=lambda: found.append((module, sys.argv)))

        monkeypatch.setattr(cli, "import_module", stand_in)
        monkeypatch.setattr(sys, "argv", ["spec-envs", *words])
        cli.main()
        [one] = found
        return one

    return call


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    """Run the command, and return the status with which it ends."""
    monkeypatch.setattr(sys, "argv", ["spec-envs", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_module_of_every_command_has_main(name: str) -> None:
    """The modules are not imported, which would take long; each also runs as ``python -m``."""
    spec = importlib.util.find_spec(cli.COMMANDS[name].module)
    assert spec is not None and spec.loader is not None
    source = spec.loader.get_source(spec.name)  # type: ignore[attr-defined]
    assert "\ndef main(" in source and source.endswith('\n\nif __name__ == "__main__":\n    main()\n')


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        *(([], name) for name in cli.COMMANDS),
        (["--help"], "spec-envs COMMAND --help describes"),
        (["bench", "--help"], "usage: spec-envs bench SUBJECT"),
        (["--version"], f"spec-envs {__version__}\n"),
    ],
)
def test_help_lists_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["spec-envs", *words])
    cli.main()
    shown = capsys.readouterr().out
    assert expected in shown and all(len(line) <= 110 for line in shown.splitlines())


def test_help_of_a_group_lists_its_subjects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.GROUPS == ["bench", "check"]
    monkeypatch.setattr(sys, "argv", ["spec-envs", "check"])
    cli.main()
    shown = capsys.readouterr().out
    assert "check zoo" in shown and "check chaos" in shown and "bench" not in shown


@pytest.mark.parametrize("words", [["--help"], ["bench", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        "import json, sys; from spec_envs import cli; "
        f"sys.argv = ['spec-envs', *{words}]; cli.main(); print(json.dumps(sorted(sys.modules)))"
    )
    shown = subprocess.check_output([sys.executable, "-c", script], text=True)
    modules = set(json.loads(shown.splitlines()[-1]))
    assert not HEAVY & modules and not {name for name in modules if name.startswith("spec_envs.experiments")}


def test_package_runs_as_the_command() -> None:
    shown = subprocess.check_output([sys.executable, "-m", "spec_envs", "--version"], text=True)
    assert shown == f"spec-envs {__version__}\n"


def test_arguments_are_passed_unchanged(called: Callable[..., tuple[str, list[str]]]) -> None:
    for name, command in cli.COMMANDS.items():
        assert called(*name.split(), "a b", "--help", "") == (
            command.module,
            [f"spec-envs {name}", "a b", "--help", ""],
        )
    for env_id in set(ENVIRONMENTS) - {"SpecTopK-v0"}:
        assert called("trace", env_id, "--depth", "3") == (
            "spec_envs.experiments.traces.record",
            ["spec-envs trace", env_id, "--depth", "3"],
        )


@pytest.mark.parametrize(
    ("words", "named", "suggested"),
    [
        (["trian", "SpecK-v0"], "trian", "train"),
        (["evaluate"], "evaluate", "eval"),
        (["decoding"], "decoding", "bench decoding"),
        (["bench", "decodin", "--count", "3"], "bench decodin", "bench decoding"),
        (["check", "zoos"], "check zoos", "check zoo"),
        (["--versoin"], "--versoin", None),
        (["bench adaptive", "--help"], "bench adaptive", "bench adaptive"),
        (["trace SpecTopK-v0"], "trace SpecTopK-v0", "trace SpecTopK-v0"),
    ],
)
def test_unknown_command_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    named: str,
    suggested: str | None,
) -> None:
    assert ended(monkeypatch, *words) == 2
    hint = f" (did you mean '{suggested}'?)" if suggested else ""
    expected = f"error: there is no command '{named}'{hint}; spec-envs --help lists them\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize("status", [0, 1, 130, 143])
def test_status_of_a_command_stays(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setattr(cli, "import_module", lambda module: SimpleNamespace(main=lambda: sys.exit(status)))
    assert ended(monkeypatch, "train") == status


def test_interrupt_during_import_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(module: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert ended(monkeypatch, "train") == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("words", [["--help"], ["bench"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_quietly(words: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "spec_envs", *words]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unread", [True, False])
def test_broken_pipe_inside_a_command_ends_in_words_unless_it_is_that_of_the_output(unread: bool) -> None:
    """The pipe to a process that was killed may break as well."""
    script = (
        "import sys; from types import SimpleNamespace; from spec_envs import cli; "
        "from spec_envs.experiments.command import one_sentence\n"
        "def fails():\n"
        "    with one_sentence():\n"
        "        raise BrokenPipeError(32, 'Broken pipe')\n"
        "cli.import_module = lambda module: SimpleNamespace(main=fails); sys.argv = ['spec-envs', 'train']; cli.main()"
    )
    read, write = os.pipe()
    if unread:
        os.close(read)
    done = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == ((141, "") if unread else (1, "error: [Errno 32] Broken pipe\n"))


@pytest.mark.parametrize("words", [["--help"], ["bench"]])
def test_terminal_without_unicode_shows_question_marks(words: list[str]) -> None:
    command = [sys.executable, "-m", "spec_envs", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert "?" in done.stdout and not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_ends_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "spec_envs"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("words", [["links"], ["bench", "cloud-load"], ["trace", "SpecTopK-v0"]])
def test_usage_names_the_command(words: list[str]) -> None:
    """Commands with one word, with two, and with an environment in place of the second."""
    shown = subprocess.check_output([sys.executable, "-m", "spec_envs", *words, "--help"], text=True)
    assert shown.startswith(f"usage: spec-envs {' '.join(words)} [-h]")
    done = subprocess.run([sys.executable, "-m", "spec_envs", *words, "--none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unrecognized arguments: --none; --help describes every option\n"
