"""Variables given to make reach the commands unchanged, or are refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spec_envs.cli import COMMANDS
from tests.support import ROOT

ODD = """a "quoted" it's $HOME $(HOME) `date` * #x"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path: Path):
    """Return a function that runs a target with a stand-in for Python and for the command, which prints its arguments."""
    stub = tmp_path / "stub"
    stub.write_text('#!/bin/sh\nfor a in "$@"; do printf \'%s\\n\' "$a"; done\n')
    stub.chmod(0o755)
    (tmp_path / "ready").touch()

    def run(target: str, *given: str, **environment: str) -> tuple[int, list[str], str]:
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        done = subprocess.run(
            [
                "make",
                "-s",
                "--no-print-directory",
                *target.split(),
                f"PY={stub}",
                f"SPEC_ENVS={stub}",
                f"READY={tmp_path / 'ready'}",
                *given,
            ],
            cwd=ROOT,
            env=kept | environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


@pytest.mark.parametrize(
    ("target", "given", "named"),
    [
        ("train", "env=SpecK-v0", "env"),
        ("train", "RUN=x", "RUN"),
        ("eval", "SEED=1", "SEED"),
        ("compare-chains", "ENV=SpecK-v0", "ENV"),
        ("docs", "ARGS=--clean", "ARGS"),
        ("generate", "Prompt=hello", "Prompt"),
        ("lint", "ARGS=x", "ARGS"),
        ("help", "AGENT=ppo", "AGENT"),
    ],
)
def test_unread_variables_are_refused(make, target: str, given: str, named: str) -> None:
    code, output, errors = make(target, given)
    assert code and not output
    assert re.search(rf"make {target} does not read {named}; it reads ", errors) and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "given", "expected"),
    [
        ("train", {}, ["train", "SpecDepth-v0", "--seed", "0", "--root", "runs", "--set"]),
        (
            "train",
            {"ENV": "SpecK-v0", "AGENT": ODD, "ROOT": "my runs", "SET": """a=[1,2] b="0x7" c=$HOME d=*"""},
            [
                *("train", "SpecK-v0", "--agent", ODD, "--seed", "0", "--root", "my runs", "--set"),
                *("a=[1,2]", 'b="0x7"', "c=$HOME", "d=*"),
            ],
        ),
        ("eval", {"RUN": "my runs/a"}, ["eval", "my runs/a", "--depth", "", "--budget", ""]),
        (
            "eval",
            {"DEPTH": "1 runs/x", "PROMPTS": ODD, "DATA_DIR": "my data", "COUNT": "3", "TEMPERATURE": "0.5"},
            [
                *("eval", "--depth", "1 runs/x", "--budget", "", "--data-dir", "my data"),
                *("--prompts", ODD, "--count", "3", "--temperature", "0.5"),
            ],
        ),
        ("generate", {"PROMPT": ODD, "RUN": "a b"}, ["generate", ODD, "--run", "a b"]),
        ("tune", {"AGENT": "svip"}, ["tune", "SpecK-v0", "--agent", "svip", "--set"]),
        (
            "tune",
            {"AGENT": "ddd", "ENV": "SpecTree-v0"},
            ["tune", "SpecTree-v0", "--agent", "ddd", "--set"],
        ),
        ("trace", {"ENV": "SpecTopK-v0"}, ["trace", "SpecTopK-v0"]),
        (
            "trace",
            {"ARGS": "--out 'my trace'"},
            ["trace", "SpecDepth-v0", "--out", "my trace"],
        ),
        ("drafter", {"KIND": "a b"}, ["drafter", "--kind", "a b"]),
        ("zoo-check", {"ARGS": "--sample 4"}, ["check", "zoo", "--sample", "4"]),
        ("chaos", {}, ["check", "chaos"]),
        ("results", {"ARGS": "--ltd-seeds 0"}, ["results", "--ltd-seeds", "0"]),
    ],
)
def test_values_are_passed_unchanged(make, target: str, given: dict[str, str], expected: list[str]) -> None:
    on_the_line = [f"{name}={value}" for name, value in given.items()]
    for code, output, errors in (make(target, *on_the_line), make(target, **given)):
        assert (code, errors, output) == (0, "", expected)


@pytest.mark.parametrize(
    ("target", "subject"),
    [
        *(("benchmark", "adaptive"), ("compare-decoding", "decoding"), ("compare-chains", "chains")),
        *(("compare-drafters", "drafters"), ("compare-exits", "exits")),
        *(("edge-cloud", "edge-cloud"), ("cloud-load", "cloud-load")),
    ],
)
def test_measurements_are_subjects_of_bench(make, target: str, subject: str) -> None:
    assert f"bench {subject}" in COMMANDS
    assert make(target, "ARGS=--count 3") == (0, ["bench", subject, "--count", "3"], "")


def test_every_command_of_the_makefile_exists() -> None:
    called = re.findall(r"\$\(SPEC_ENVS\) ((?:(?:bench|check) )?\S+)", (ROOT / "Makefile").read_text())
    assert called and not set(called) - set(COMMANDS)


def test_host_is_not_read_from_environment(make) -> None:
    assert make("edge", HOST="x86_64-linux")[1][:2] == ["edge", "localhost"]
    assert make("edge", "HOST=cloud")[1][1] == "cloud"


def test_help_lists_every_target(make) -> None:
    listed = {line.split()[0] for line in make("help")[1]}
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony and set(phony[1].replace("\\\n", " ").split()) == listed


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *(("train", name) for name in ("ENV", "AGENT", "SEED", "SET", "ROOT")),
        *(("tune", "ENV"), ("trace", "ENV"), ("generate", "PROMPT"), ("edge", "HOST")),
        *(("drafter", "KIND"), ("tensorboard", "ROOT"), ("eval", "RUN")),
    ],
)
def test_values_are_not_expanded_by_make(make, target: str, name: str, tmp_path: Path) -> None:
    """No value runs as code, neither when make reads it nor when it is passed to a command."""
    mark = tmp_path / "ran"
    value = f"$(shell touch {mark})"
    code, output, _ = make(target, f"{name}={value}")
    assert not mark.exists()
    assert code == 0 and all(word in output for word in (value.split() if name == "SET" else [value]))
