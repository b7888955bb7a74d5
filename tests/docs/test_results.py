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
from spec_envs.experiments.benchmark import arms as benchmark_arms
from spec_envs.experiments.benchmark.findings import (
    Benchmark,
    Checks,
    Equality,
    FewTexts,
    Findings,
    Learned,
    OtherCosts,
    OverStatic,
    RecordingCost,
    References,
    Speeds,
    Tuned,
)
from spec_envs.experiments.benchmark.problems import FAST, LEARNED
from spec_envs.experiments.comparisons import chains, decoding, exits
from spec_envs.experiments.comparisons.floor import Floor
from spec_envs.experiments.comparisons.quality import Quality
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.exits.evaluation import Acceptance
from spec_envs.experiments.measure.pages import Page
from spec_envs.experiments.measure.results import Drift
from spec_envs.experiments.network import cloud_load, edge_cloud
from tests.support import ROOT
from tests.support.results import CURVES, MACHINE, interval, results

RESULTS = ROOT / "docs" / "results"
WITHOUT_DATA = {"index", "adaptive-control"}  # the latter was measured before its command wrote a JSON file
PUBLISHED = sorted(RESULTS.glob("*.json"))


def speeds() -> decoding.Speeds:
    others = ("transformers generate", "transformers assisted", "llama.cpp", "llama.cpp drafting")
    return decoding.Speeds(
        target="smollm2-135m",
        drafter="smollm2-135m-eagle3",
        table=results(["static", *others], ["plain", *others], ["static"]),
        ratios={name: interval(1.5) for name in decoding.RATIOS},
        floor=Floor(10**8, 2e10, 0.005, 0.5),
        emitted_per_cycle=2.0,
        overhead_share=0.03,
        verify_curve={1: 1.0, 8: 1.2},
        expand_ratio=0.12,
        curves_by_dtype={"int8": CURVES, "float32": CURVES},
        quality={"int8": Quality(2.0, 0.99, 0.001), "float32": Quality(1.9, 1.0, 0.0)},
        dtype="int8",
    )


def lengths() -> chains.Chains:
    fixed = [*(f"K = {k}" for k in chains.FIXED), chains.BEST]
    table = results([*fixed, *chains.CONTROLLERS], ["plain", chains.BEST], chains.CONTROLLERS)
    return chains.Chains(
        **vars(table),
        models="target `smollm2-135m` and the drafter `smollm2-135m-draft`",
        by_context={name: {"math": 90.0, "code": 110.0} for name in table.arms},
        variation=dict.fromkeys(table.arms, 0.1),
        acceptance={name: [0.4, 0.5, 0.6] for name in table.arms if not name.startswith("plain")},
        agents={name: load_experiment(chains.ID, name, []).agent for name in chains.CONTROLLERS},
        best_fixed_over_plain=interval(1.5),
        best_agent="svip-tuned",
        best_agent_over_best_fixed=interval(1.1),
    )


def trained_exits() -> exits.Exits:
    curve = [{"tokens": n, "accept_rate": n / 1000, "emitted_per_cycle": 1 + n / 1000} for n in (0, 100, 200)]
    return exits.Exits(
        machine=MACHINE,
        prompts=4,
        k=4,
        untrained=Acceptance(0.03, 1.03),
        stanzas={
            name: [exits.Learned(acceptance=Acceptance(0.2, 1.3), drift=Drift(2.0, 0.0, 0.0), seed=0, curve=curve)]
            for name in exits.STANZAS
        },
    )


def edge_and_cloud() -> edge_cloud.EdgeCloud:
    def row(speed: float) -> edge_cloud.Row:
        return edge_cloud.Row(
            tokens_per_second=100 * speed,
            over={"plain": interval(speed), "plain_without_prefill": interval(speed)},
            latency_s=1 / speed,
            seconds=dict.fromkeys(edge_cloud.PARTS, 0.2 / speed),
            breakdown=dict.fromkeys(edge_cloud.PARTS, 20.0),
            acceptance=None if speed == 1 else 0.2,
            rounds=20.0,
            tokens=60.0,
            bytes_up=10.0,
            bytes_down=10.0,
        )

    rows = {"edge-cloud": row(0.8), "plain": row(1.0), "plain again": row(1.0)}
    return edge_cloud.EdgeCloud(
        arms=rows,
        prompts=5,
        iterations=2,
        max_new_tokens=64,
        settings=edge_cloud.Settings(
            target="smollm2-135m",
            drafter="auto",
            temperature=1.0,
            k=4,
            mode="topk",
            top_k=50,
            link="over loopback",
            own_cloud=True,
            machine=MACHINE,
        ),
        headline=edge_cloud.Headline.of(rows["edge-cloud"]),
    )


def load() -> cloud_load.CloudLoad:
    point = cloud_load.Point(100.0, 10.0, 20.0, 300, 0.7)
    return cloud_load.CloudLoad(
        points={edges: dict.fromkeys(cloud_load.SERVERS, point) for edges in (1, 4)},
        batched_over_unbatched={1: interval(1.0), 4: interval(1.9)},
        target="smollm2-135m",
        k=4,
        wrong=0.15,
        seconds=6.0,
        rounds=3,
        machine=MACHINE,
    )


def findings(env_id: str) -> Findings:
    rules = list(benchmark_arms.GRIDS[env_id])
    live = results(["static", *LEARNED, *rules], ["plain", "static"], [*LEARNED, *rules])
    over = {name: OverStatic(*vars(row.over["static"]).values()) for name, row in live.arms.items()}
    learned = Learned(ratio=interval(1.05), seeds=[1.05], train_seconds=2.0, forwards=1000, chosen="hindsight-0")
    return Findings(
        settings=FAST,
        checks=Checks(CURVES, MACHINE, Equality(40, 0, 0, 1.0), Speeds(100.0, 1e6, 1e4), RecordingCost(0.01, 0.02)),
        references=References([2, 7] if env_id != "SpecK-v0" else [4], 1.4, 1.01, 1.3, 1.08),
        replay=dict.fromkeys(LEARNED, learned) | {name: Tuned(settings={}, value=1.0, by_domain=1.0) for name in rules},
        hindsight_train_s=2.0,
        other_costs={"qwen3-14b-a6000": OtherCosts([4] if env_id == "SpecK-v0" else [2, 7], 1.02, 1.1)},
        few_texts=[FewTexts(1, 100, 1.0), FewTexts(3, 200, 1.06)],
        tasks={"gsm8k": 1.05},
        gap_share=0.3,
        of_informed=0.98,
        live=live,
        arms=over,
        sampled=over,
    )


BENCHMARK = import_module(COMMANDS["bench adaptive"].module)
CONSTRUCTED: dict[str, Any] = {
    "decoding": (decoding.PAGE, speeds),
    "chains": (chains.PAGE, lengths),
    "exits": (exits.PAGE, trained_exits),
    "edge-cloud": (edge_cloud.PAGE, edge_and_cloud),
    "cloud-load": (cloud_load.PAGE, load),
    "adaptive-control": (
        BENCHMARK.PAGE,
        lambda: Benchmark(problems={env_id: findings(env_id) for env_id in benchmark_arms.GRIDS}, fast=False),
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


def test_small_version_says_so_and_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Benchmark(problems={"SpecK-v0": findings("SpecK-v0")}, fast=True)
    assert "too few texts and seeds" in BENCHMARK.PAGE.write(small, tmp_path / "x.json")
    monkeypatch.setattr(BENCHMARK, "benchmark", lambda args: small)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--fast", "--out", str(tmp_path)])
    BENCHMARK.main()
    assert (tmp_path / "adaptive-control-fast.md").exists() and not (tmp_path / "adaptive-control.md").exists()


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_page_is_what_its_data_say(path: Path) -> None:
    command = " ".join(json.loads(path.read_text(encoding="utf-8"))["made"]["command"].split()[1:3])
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
        f"while decoding pays: the best agent, `svip-tuned`, is {interval(1.1):.2f} times the best fixed length.",
    ):
        assert sentence in text
    headline.draw(tmp_path, tmp_path / "headline.png")
    assert (tmp_path / "headline.png").stat().st_size > 10_000
    page = f"a\n{headline.BEGIN}\nold\n{headline.END}\nb\n"
    assert headline.inserted(page, "new") == f"a\n{headline.BEGIN}\nnew\n{headline.END}\nb\n"
    with pytest.raises(ValueError, match="does not have the lines"):
        headline.inserted("a", "new")


@pytest.mark.skipif(
    not {"decoding", "chains"} <= {path.stem for path in PUBLISHED}, reason="needs the pages decoding and chains"
)
def test_readme_says_what_the_data_say() -> None:
    text = headline.README.read_text(encoding="utf-8")
    assert text == headline.inserted(text, headline.paragraph(RESULTS)), "run docs/_scripts/headline.py"
