"""Variables given to make reach the commands unchanged, or are refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

ODD = """a "quoted" it's $HOME $(HOME) `date` * #x"""
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path: Path):
    """Return a function that runs a target with a stand-in for Python, which prints its arguments."""
    stub = tmp_path / "python"
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
        ("bench", "ENV=SpecK-v0", "ENV"),
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
        ("train", {}, ["spec_envs.experiments.train", "SpecDepth-v0", "--seed", "0", "--root", "runs", "--set"]),
        (
            "train",
            {"ENV": "SpecK-v0", "AGENT": ODD, "ROOT": "my runs", "SET": """a=[1,2] b="0x7" c=$HOME d=*"""},
            [
                *(
                    "spec_envs.experiments.train",
                    "SpecK-v0",
                    "--agent",
                    ODD,
                    "--seed",
                    "0",
                    "--root",
                    "my runs",
                    "--set",
                ),
                *("a=[1,2]", 'b="0x7"', "c=$HOME", "d=*"),
            ],
        ),
        ("eval", {"RUN": "my runs/a"}, ["spec_envs.experiments.evaluate", "my runs/a", "--depth", "", "--budget", ""]),
        (
            "eval",
            {"DEPTH": "1 runs/x", "PROMPTS": ODD, "DATA_DIR": "my data", "COUNT": "3", "TEMPERATURE": "0.5"},
            [
                *("spec_envs.experiments.evaluate", "--depth", "1 runs/x", "--budget", "", "--data-dir", "my data"),
                *("--prompts", ODD, "--count", "3", "--temperature", "0.5"),
            ],
        ),
        ("generate", {"PROMPT": ODD, "RUN": "a b"}, ["spec_envs.experiments.stream", ODD, "--run", "a b"]),
        ("tune", {"AGENT": "svip"}, ["spec_envs.experiments.tune", "SpecK-v0", "--agent", "svip", "--set"]),
        (
            "tune",
            {"AGENT": "ddd", "ENV": "SpecTree-v0"},
            ["spec_envs.experiments.tune", "SpecTree-v0", "--agent", "ddd", "--set"],
        ),
        ("trace", {"ENV": "SpecTopK-v0"}, ["spec_envs.experiments.traces.record_expected"]),
        (
            "trace",
            {"ARGS": "--out 'my trace'"},
            ["spec_envs.experiments.traces.record", "SpecDepth-v0", "--out", "my trace"],
        ),
        ("drafter", {"KIND": "a b"}, ["spec_envs.experiments.drafters", "--kind", "a b"]),
        ("zoo-check", {"ARGS": "--sample 4"}, ["spec_envs.experiments.checks.zoo", "--sample", "4"]),
        ("chaos", {}, ["spec_envs.experiments.checks.chaos"]),
    ],
)
def test_values_are_passed_unchanged(make, target: str, given: dict[str, str], expected: list[str]) -> None:
    on_the_line = [f"{name}={value}" for name, value in given.items()]
    for code, output, errors in (make(target, *on_the_line), make(target, **given)):
        assert (code, errors, output) == (0, "", ["-m", *expected])


@pytest.mark.parametrize(
    ("former", "target", "module"),
    [
        ("bench", "compare-decoding", "decoding"),
        ("bench-k", "compare-chains", "chains"),
        ("bench-dvi", "compare-exits", "exits"),
    ],
)
def test_former_names_still_work(make, former: str, target: str, module: str) -> None:
    expected = ["-m", f"spec_envs.experiments.comparisons.{module}", "--count", "3"]
    assert make(target, "ARGS=--count 3") == (0, expected, "")
    code, output, errors = make(former, "ARGS=--count 3")
    assert (code, output) == (0, expected) and f"make {former} is now called make {target}" in errors


def test_host_is_not_read_from_environment(make) -> None:
    assert make("edge", HOST="x86_64-linux")[1][:3] == ["-m", "spec_envs.network.edge", "localhost"]
    assert make("edge", "HOST=cloud")[1][2] == "cloud"


def test_help_and_readme_list_every_target(make) -> None:
    listed = {line.split()[0] for line in make("help")[1]}
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony and set(phony[1].replace("\\\n", " ").split()) == listed
    readme = (ROOT / "README.md").read_text()
    assert not [target for target in listed - {"setup"} if f"make {target}" not in readme]


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
