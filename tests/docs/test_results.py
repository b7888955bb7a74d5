"""Pages of results say what their data say, for constructed results of every command and for those that are published."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from docs._scripts import headline
from spec_envs import ENVIRONMENTS
from spec_envs.cli import COMMANDS
from spec_envs.experiments.benchmark.arms import GRIDS
from spec_envs.experiments.benchmark.findings import Benchmark
from spec_envs.experiments.comparisons import chains, decoding, drafters, exits
from spec_envs.experiments.network import cloud_load, edge_cloud
from spec_envs.experiments.reports.pages import Page
from tests.docs.constructed import (
    compared_drafters,
    edge_and_cloud,
    findings,
    interval,
    lengths,
    load,
    speeds,
    trained_exits,
)
from tests.support import ROOT

RESULTS = ROOT / "docs" / "results"
WITHOUT_DATA = {"index", "adaptive-control"}  # the latter was measured before its command wrote a JSON file
PUBLISHED = sorted(set(RESULTS.glob("*.json")) - {RESULTS / "final-uses.json"})


BENCHMARK = import_module(COMMANDS["bench adaptive"].module)
CONSTRUCTED: dict[str, Any] = {
    "decoding": (decoding.PAGE, speeds),
    "chains": (chains.PAGE, lengths),
    "drafters": (drafters.PAGE, compared_drafters),
    "exits": (exits.PAGE, trained_exits),
    "edge-cloud": (edge_cloud.PAGE, edge_and_cloud),
    "cloud-load": (cloud_load.PAGE, load),
    "adaptive-control": (
        BENCHMARK.PAGE,
        lambda: Benchmark(problems={env_id: findings(env_id) for env_id in GRIDS}, fast=False),
    ),
}


def write(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the constructed results of a command into a folder, and return the page."""
    monkeypatch.setattr(sys, "argv", ["spec-envs", "--out", "docs/results"])
    page, construct = CONSTRUCTED[name]
    return page.write(construct(), folder / f"{name}.json")


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_page_is_complete_and_made_from_its_data_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, page = write(name, tmp_path, monkeypatch), CONSTRUCTED[name][0]
    assert (tmp_path / f"{name}.md").read_text() == text == page.text(tmp_path / f"{name}.json")
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    head = text.splitlines()
    assert head[2].startswith("# ") and head[4].endswith(".") and head[6].endswith(f"]({name}.png)")
    for row in (
        f"| command | `spec-envs {page.command} --out docs/results` |",
        "| revision | [`0123abc`](https://github.com/spec-envs/spec-envs/commit/0123abc) |",
        "| processor | A Processor, 2 threads |",
        "| dtype | int8 |",
        "| versions | torch 2.8.0, numpy 2.0.0 |",
    ):
        assert text.count(row) == 1, row
    assert re.search(r"\| date \| \d{4}-\d\d-\d\d \(UTC\) \|", text)
    assert "## Arms" in text and "index.md#how-a-number-is-made" in text and "../concepts/lossless.md" in text


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_links_of_pages_lead_somewhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write(name, tmp_path, monkeypatch)
    for target in re.findall(r"\]\(([^)#]+)", text):
        generated = [f"../environments/{env_id}.md" for env_id in ENVIRONMENTS]
        if not target.startswith("https://") and target not in generated:
            assert (RESULTS / target).exists() or (tmp_path / target).exists(), target


def test_every_arm_of_a_page_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write("chains", tmp_path, monkeypatch)
    described = re.findall(r"^- `(.+?)`: ", text.partition("## Arms")[2], re.MULTILINE)
    assert described == list(lengths().arms)
    assert "[`svip`](../agents/rules.md), a published rule, with the settings of the stanza `svip-tuned`." in text


def test_data_of_another_command_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("cloud-load", tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"cloud-load\.json does not hold the figures of this command \(.+ is missing"):
        exits.PAGE.text(tmp_path / "cloud-load.json")


def test_incomplete_data_are_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data whose fields have the right types, but lack what the page compares."""
    write("exits", tmp_path, monkeypatch)
    path = tmp_path / "exits.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stanzas": {}}))
    monkeypatch.setattr(sys, "argv", ["exits", "--from-json", str(path)])
    with pytest.raises(SystemExit, match=r"error: .+exits\.json does not hold all figures of this command"):
        exits.main()
    page = path.rename(tmp_path / "exits.md")
    monkeypatch.setattr(sys, "argv", ["exits", "--from-json", str(page)])
    before = page.read_bytes()
    with pytest.raises(SystemExit, match=r"exits\.md is not named \.json; expected the JSON file beside a page"):
        exits.main()
    assert page.read_bytes() == before


def test_page_of_the_benchmark_has_lookup_alone(tmp_path: Path) -> None:
    page = BENCHMARK.PAGE.write(Benchmark(problems={"SpecK-v0": findings("SpecK-v0")}, fast=False), tmp_path / "x.json")
    assert "| k 3: 0.830 |" in page and "- `static lookup`: prompt lookup alone" in page


def test_small_version_says_so_and_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Benchmark(problems={"SpecK-v0": findings("SpecK-v0")}, fast=True)
    assert "too few texts and seeds" in BENCHMARK.PAGE.write(small, tmp_path / "x.json")
    monkeypatch.setattr(BENCHMARK, "benchmark", lambda args, root: small)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--fast", "--out", str(tmp_path)])
    BENCHMARK.main()
    assert (tmp_path / "adaptive-control-fast.md").exists() and not (tmp_path / "adaptive-control.md").exists()


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_page_is_what_its_data_say(path: Path) -> None:
    words = json.loads(path.read_text(encoding="utf-8"))["made"]["command"].split()[1:3]
    command = " ".join(words) if words[0] == "bench" else words[0]
    page: Page[Any] = import_module(COMMANDS[command].module).PAGE
    assert path.with_suffix(".md").read_text(encoding="utf-8") == page.text(path), (
        f"{path.stem}.md was edited, or its command says other words now; "
        f"write it again with spec-envs {command} --from-json {path.relative_to(ROOT)}"
    )
    assert path.with_suffix(".png").exists()


def test_published_pages_have_data() -> None:
    assert {path.stem for path in RESULTS.glob("*.md")} - WITHOUT_DATA <= {path.stem for path in PUBLISHED}


def test_index_lists_every_command() -> None:
    listed = re.findall(r"\| `spec-envs (bench [\w-]+)` \|", (RESULTS / "index.md").read_text(encoding="utf-8"))
    assert set(listed) == {name for name in COMMANDS if name.startswith("bench ")}


def test_headline_is_made_from_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("decoding", "chains"):
        write(name, tmp_path, monkeypatch)
    text = headline.paragraph(tmp_path)
    for sentence in (
        f"plain decoding of smollm2-135m is {interval(1.5):.2f} times llama.cpp and {interval(1.5):.2f} times "
        f"transformers on the same weights, and the best static speculation is {interval(1.5):.2f} times plain decoding",
        f"the best fixed draft length, K = 4, is {interval(1.5):.2f} times plain decoding",
        f"validation prompts, `svip-tuned`, is {interval(1.1):.2f} times as fast as that length",
    ):
        assert sentence in text
    headline.draw(tmp_path, tmp_path / "headline.png")
    assert (tmp_path / "headline.png").stat().st_size > 10_000
    page = f"a\n{headline.BEGIN}\nold\n{headline.END}\nb\n"
    assert headline.inserted(page, "new") == f"a\n{headline.BEGIN}\nnew\n{headline.END}\nb\n"
    with pytest.raises(ValueError, match="does not have the lines"):
        headline.inserted("a", "new")


def test_readme_says_what_the_data_say() -> None:
    text = headline.README.read_text(encoding="utf-8")
    assert text == headline.inserted(text, headline.paragraph(RESULTS)), "run docs/_scripts/headline.py"
