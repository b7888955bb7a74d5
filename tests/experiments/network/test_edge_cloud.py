"""Edge and cloud against the cloud alone, and a cloud under load, over the tiny models and real sockets."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from spec_envs.experiments.measure.arms import Encoded, Sample
from spec_envs.experiments.network import cloud_load, edge_cloud
from spec_envs.experiments.network.cloud_process import running
from tests.support.commands import run_command

KEYS = {"speedup", "acceptance", "network_s", "edge_s", "cloud_s", "bytes_up", "bytes_down", "assessment", "machine"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """Return a list to which every started process is added."""
    processes: list[subprocess.Popen[str]] = []

    class RecordedProcess(subprocess.Popen):
        def __init__(self, command: Any, *arguments: Any, **settings: Any):
            super().__init__(command, *arguments, **settings)
            if "-m" in command:
                processes.append(self)

    monkeypatch.setattr("spec_envs.experiments.network.cloud_process.subprocess.Popen", RecordedProcess)
    return processes


def test_edge_cloud_comparison(
    tiny_target: Path,
    tiny_draft: Path,
    tmp_path: Path,
    started: list[subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = ["--target", tiny_target, "--drafter", tiny_draft, "--dtype", "float32", "--out", tmp_path]
    size = ["--num-prompts", 1, "--iterations", 2, "--max-new-tokens", 12, "--top-k", 8]
    run_command(monkeypatch, edge_cloud, *models, *size, "--link", "constant:up=100,down=100,rtt=4")
    assert len(started) == 2 and all(process.returncode is not None for process in started)  # the cloud and the proxy
    results = json.loads((tmp_path / "edge-cloud.json").read_text())
    assert set(results) >= KEYS and set(results["arms"]) == {"edge-cloud", "plain", "plain again"}
    assert results["machine"]["dtype"] == "float32" and results["prompts"] == 1 and results["own_cloud"]
    for row in results["arms"].values():
        assert sum(row["breakdown"].values()) == pytest.approx(100)
        assert sum(row[f"{part}_s"] for part in edge_cloud.PARTS) == pytest.approx(row["latency_s"])
    own, plain = results["arms"]["edge-cloud"], results["arms"]["plain"]
    assert own["network_s"] > 0.003 * own["rounds"] and own["bytes_up"] > 0 and own["edge_s"] > 0
    assert plain["edge_s"] == 0 and plain["bytes_up"] == 0 and plain["acceptance"] is None
    assert results["speedup"] == pytest.approx(own["tokens_per_second"] / plain["tokens_per_second"])
    assert (tmp_path / "edge-cloud.png").stat().st_size > 10_000
    page = (tmp_path / "edge-cloud.md").read_text()
    assert "| cloud-only again |" in page and f"{results['assessment']}." in page and page in capsys.readouterr().out

    with pytest.raises(SystemExit, match="--num-prompts is 11; expected 1 to 10"):
        run_command(monkeypatch, edge_cloud, "--num-prompts", 11)


@pytest.mark.parametrize(
    ("speedup", "word"), [(1.51, "EXCELLENT"), (1.5, "GOOD"), (1.2, "MODERATE"), (1.1, "POOR"), (0.5, "POOR")]
)
def test_assessment_by_speedup(speedup: float, word: str) -> None:
    assert edge_cloud.assessment(speedup) == word


def test_iterations_of_a_prompt_are_pooled() -> None:
    def sample(ids: list[int], tokens: int, seconds: float) -> Sample:
        return Sample(Encoded("", ids), tokens, seconds, 1.0, [])

    pooled = edge_cloud.by_prompt([sample([1], 5, 2.0), sample([2], 7, 3.0), sample([1], 10, 4.0)])
    assert [(s.tokens, s.seconds) for s in pooled] == [(15, 6.0), (7, 3.0)]
    assert (whole := edge_cloud.whole_text(pooled[0])).tokens == 16 and whole.seconds == 7.0


def test_load_of_several_edges(
    tiny_target: Path,
    tmp_path: Path,
    started: list[subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = ["--target", tiny_target, "--dtype", "float32", "--out", tmp_path]
    run_command(monkeypatch, cloud_load, *models, "--edges", "1,3", "--seconds", 0.5, "--rounds", 1, "--wrong", 0)
    assert len(started) == 2 and all(process.returncode is not None for process in started)
    results = json.loads((tmp_path / "cloud-load.json").read_text())
    assert set(results["points"]) == {"1", "3"}
    for servers in results["points"].values():
        for found in servers.values():
            assert found["requests"] > 0 and found["acceptance"] == 1  # no draft was made wrong on purpose
            assert found["tokens_per_second"] == pytest.approx(5 * found["requests"] / 0.5)
            assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert (tmp_path / "cloud-load.png").stat().st_size > 10_000
    page = (tmp_path / "cloud-load.md").read_text()
    assert "| 3 | unbatched |" in page and page in capsys.readouterr().out


def test_failed_start_is_reported() -> None:
    proxy = running("spec_envs.network.proxy", "--listen", "0", "--to", "1", "--link", "nowhere")
    with pytest.raises(ValueError, match=r"network\.proxy ended while it started: no link 'nowhere'") as error, proxy:
        pass
    assert "\n" not in str(error.value)
