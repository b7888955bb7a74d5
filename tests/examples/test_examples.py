"""The examples run from any directory and show what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from spec_envs.experiments.traces import record
from spec_envs.experiments.traces.plan import Plan
from spec_envs.experiments.traces.record import recorded
from tests.support import ROOT

EXAMPLES = ROOT / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def output_of(name: str, directory: Path, *arguments: object) -> str:
    """Run an example in a directory and return what it prints."""
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.check_output(command, cwd=directory, env=ENVIRONMENT, text=True)


def numbers(pattern: str, text: str) -> list[float]:
    """Return the numbers that the groups of a pattern find in a text."""
    found = re.search(pattern, text)
    assert found, text
    return [float(number.replace(",", "")) for number in found.groups()]


@pytest.mark.model
def test_random_agent_prints_the_models_own_text(tmp_path: Path) -> None:
    shown = output_of("random_agent.py", tmp_path, "--tokens", 20)
    assert shown.startswith("The sky is blue because of")
    tokens, forwards, decisions = numbers(r"\n(\d+) tokens from (\d+) forwards .* after (\d+) random decisions", shown)
    assert tokens == 20 and forwards < tokens - 1 and decisions >= forwards
    [accepted] = numbers(r"(\d+) drafted tokens were accepted", shown)
    assert forwards + accepted >= tokens - 1  # without the first token; the last draft may go beyond the end
    assert numbers(r"([\d.]+) times as fast", shown) > [0]


def test_ppo_learns(tmp_path: Path) -> None:
    before, after = numbers(
        r"(-?[\d.]+) before training, (-?[\d.]+) after 4,096 steps", output_of("sb3_ppo.py", tmp_path, 4096)
    )
    assert before < -20 < after


def test_replay_counts_steps_and_compares_lengths(plans: dict[str, Plan], tmp_path: Path) -> None:
    small = Plan("SpecK-v0", plans["chain"].env | {"k_max": 16}, (2, 1, 1))
    trace = recorded(small, tmp_path / "trace").folder
    shown = output_of("replay_million_steps.py", tmp_path, trace, "--steps", 20_000, "--envs", 300)
    rows = dict(re.findall(r"draft +(\d+) tokens: ([\d.]+) times plain", shown))
    assert [*map(int, rows)] == [*range(17)] and rows["0"] == "1.00"
    steps, rate = numbers(r"\n([\d,]+) steps in .*: ([\d,]+) steps per second", shown)
    assert steps == 20_100 and rate > 1000


def test_replay_records_what_it_replays() -> None:
    """The command that it runs where no trace is given is one of SpecK-v0's."""
    small = runpy.run_path(str(EXAMPLES / "replay_million_steps.py"))["SMALL"]
    assert record.arguments(["SpecK-v0", *small, "--out", "folder"]).texts == [4, 1, 1]


def test_own_control_is_trained(tmp_path: Path) -> None:
    shown = output_of("own_control.py", tmp_path, 4096)
    speeds = dict(re.findall(r"(always \d+|trained): code .*, all texts ([\d.]+) times", shown))
    assert [*speeds] == ["always 0", "always 4", "always 12", "trained"] and speeds["always 0"] == "1.00"
    assert float(speeds["trained"]) > float(speeds["always 4"]) > 3


def test_own_agent_drafts_more_of_code_than_of_math(tmp_path: Path) -> None:
    shown = output_of("own_agent.py", tmp_path, 5000)
    lengths = {kind: int(k) for kind, k in re.findall(r"(\w+): draft (\d+) tokens", shown)}
    assert lengths.keys() == {"code", "prose", "math"} and lengths["code"] > lengths["math"] > 1


@pytest.mark.model
def test_server_streams_text_under_its_policy(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "custom_policy_server.py", "--port", "0", "--tokens", "24"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(url, data=b"Why is the sky blue?", timeout=60) as answer:
                assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
                text = answer.read().decode()
        finally:
            server.terminate()
        log = server.communicate()[1]
    assert text.startswith("The sky is blue because of")
    found = re.search(r"drafted \[2, ([\d, ]+)\] tokens in turn; \d+ tokens/s", log)
    assert found and set(found[1].split(", ")) <= {"1", "2", "4", "8", "16"}


@pytest.mark.parametrize("name", FILES)
def test_example_is_short_and_explained(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert text.startswith('"""') and f"\n    python {name}" in text.split('"""')[1]
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"| [{name}]({name}) |" in table and f"| `python {name}` |" in table
