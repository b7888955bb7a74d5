"""No measured figure is typed by hand: README.md and the pages link to docs/results, which commands write.

A figure that was not measured may stand: a paragraph, a list item or a row of a table with a link to arXiv cites it, and
the line `<!-- not measured -->` before a paragraph, list or table says that the code defines it (a time limit, a rate).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

NUMBER = r"(?<![\w.,])[-−]?\d[\d,]*(?:\.\d+)?"
WORD = r"(?:two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty|forty|hundred)"
FIGURES = {
    "an interval": r"\[[-−]?\d+\.\d+, ?[-−]?\d+\.\d+\]",
    "a ratio": rf"{NUMBER} ?×(?! ?\d)|(?<![\w.,])\d+\.\d+ times\b|\b(?:twice|{WORD} times|{NUMBER} times) as (?:fast|slow|quick|good)\b"
    rf"|\b(?:{WORD}|{NUMBER}) times (?:faster|slower|more|less|fewer)\b",
    "a rate": rf"{NUMBER} (?:million |thousand )?(?:tokens?|steps|cycles|texts|positions) ?(?:/ ?s\b|per second|a second)",
    "a bandwidth": rf"{NUMBER} ?[kMG]i?B ?(?:/ ?s\b|per second)",
    "a duration": rf"(?:{NUMBER}|\b{WORD}) ?(?:ms|µs|milliseconds?|seconds?|minutes?|min|hours?)\b|{NUMBER} (?:s|h)\b",
    "a share": r"(?!95 % (?:interval|confidence))(?<!probability of )(?<![\w.,±])\d[\d,]*(?:\.\d+)? ?%(?!\])",
    "a divergence": rf"{NUMBER} nats\b",
}
CITED = re.compile(r"arxiv\.org|arXiv", re.IGNORECASE)
ALLOWED = "<!-- not measured -->"
GENERATED = ("docs/environments", "docs/experiments/yaml.md", "docs/experiments/commands.md", "docs/_scripts")
WRITTEN = [path for path in (ROOT / "docs" / "results").glob("*.md") if path.stem != "index"]
PAGES = [
    path
    for path in sorted((ROOT / "docs").glob("**/*.md"))
    if path not in WRITTEN and not str(path.relative_to(ROOT)).startswith(GENERATED)
]


def without_code(text: str) -> str:
    """Return a page with code, and what commands write into it, blanked out line by line."""

    def blank(found: re.Match[str]) -> str:
        return "\n" * found[0].count("\n")

    text = re.sub(r"<!-- results:begin -->.*?<!-- results:end -->", blank, text, flags=re.DOTALL)
    text = re.sub(
        r"<!-- (?:agents|agent: \S+|hyper-parameters: \S+|text: \S+) -->.*?<!-- end -->", blank, text, flags=re.DOTALL
    )
    text = re.sub(r"^ *(`{3,}).*?^ *\1 *$", blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<!`)(`+)(?!`)(?:[^`\n]|\n(?! *[\n|-]))+\1(?!`)", lambda found: "code" + blank(found), text)
    return re.sub(r"\]\([^)]*\)", lambda found: found[0] if CITED.search(found[0]) else "]", text)


def passages(text: str) -> Iterator[tuple[int, str]]:
    """Yield the paragraphs, list items and rows of tables of a page, each with the number of its first line; those that
    are allowed are left out."""
    first, lines, allowed = 0, list[str](), False
    for number, line in enumerate([*without_code(text).splitlines(), ""], 1):
        begins = not line.strip() or re.match(r" *(?:[-*|#>]|\d+\.) ?|.*<!--", line)
        if begins and lines:
            if not allowed:
                yield first, " ".join(lines)
            lines = []
        if ALLOWED in line:
            allowed = True
        elif not line.strip():
            allowed = False
        else:
            first, lines = (first if lines else number), [*lines, line.strip()]


def figures(text: str) -> list[str]:
    """Return the figures of a page that look measured, each with its line."""
    found = []
    for number, passage in passages(text):
        if not CITED.search(passage):
            for kind, pattern in FIGURES.items():
                found += [f"line {number}: {kind}, {match[0]!r}" for match in re.finditer(pattern, passage)]
    return found


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("`hindsight` is 1.14 [1.10, 1.18] times as fast as S*.", "an interval"),
        ("| K = 4 | 185.4 | 1.77 [1.56, 2.03] | 1 | 2.35 |", "an interval"),
        ("The exit alone reaches 1.1× plain decoding.", "a ratio"),
        ("It is 2.9 × what the policy gradient gains.", "a ratio"),
        ("`dvi` gains 2.9 times what the policy gradient gains.", "a ratio"),
        ("A compiler makes it three to six times faster.", "a ratio"),
        ("Two arms are twice as fast.", "a ratio"),
        ("Decoding is three times as fast.", "a ratio"),
        ("Plain decoding makes 71.4 tokens/s there.", "a rate"),
        ("Replays run at 2.6 to 6.7 million steps per second.", "a rate"),
        ("Memory is read at 20 GB/s.", "a bandwidth"),
        ("T_verify(1) is 8.8 ms.", "a duration"),
        ("The first takes about 12 minutes on two cores.", "a duration"),
        ("An agent learned from one in two seconds.", "a duration"),
        ("Training takes 1.6 to 5.2 s.", "a duration"),
        ("- 17 % of the drafted tokens are accepted.", "a share"),
        ("Two to four percent are Python, 3.5% of the time.", "a share"),
        ("The drift is 3.29 nats.", "a divergence"),
        ("A list:\n- one\n- it takes 5 minutes\n  of your time", "a duration"),
        ("<!-- not measured -->\nA limit of 5 s.\n\nIt takes 9 s.", "line 4: a duration"),
        ("Cited before (arXiv 2404.18911).\n\nIt is 1.2 × plain.", "a ratio"),
    ],
)
def test_measured_figures_are_found(line: str, kind: str) -> None:
    assert any(kind in found for found in figures(line)), figures(line)


@pytest.mark.parametrize(
    "text",
    [
        "The model has 98 MB, unpacked 0.5 GB, and 49,152 tokens; 17 actions; 28 numbers in [0, 1].",
        "A 95 % interval by bootstrap, as in *over plain [95 %]*.",
        "Kangaroo reports up to 1.68× ([arXiv 2404.18911](https://arxiv.org/abs/2404.18911)).",
        "The draft grows\nto 2.0 times the speed, as published in\n[arXiv 2404.18911](https://arxiv.org/abs/2404.18911).",
        "Run it with `--seconds 10 ms` or `x = 3.0 × y`.",
        "```text\n101.8 tokens/s, 1.39 [1.30, 1.48] × plain\n```",
        "<!-- not measured -->\nThe edge waits 10 seconds for the cloud\nand then drafts alone for 5 minutes.",
        "<!-- not measured -->\n| link | round trip |\n|---|---|\n| 5g | 50 ms |\n| lte | 70 ms |",
        "<!-- results:begin -->\nIt is 1.39 [1.30, 1.48] times plain.\n<!-- results:end -->",
        "A grid of 10 × 10 values, depth × budget, 2 cores, Python 3.11, version 0.1.0, step 2.",
        "It is decided for 64 tokens, in K = 4, 8 and 16; γ = 0.95; float32.",
        "Void is an interval wider than ±5 %; a bias is found with a probability of 95 %.",
        "Every prompt is answered three times, or twice as many are taken.",
    ],
)
def test_other_numbers_may_stand(text: str) -> None:
    assert figures(text) == []


def test_figures_of_a_long_page_are_found() -> None:
    text = (ROOT / "docs" / "results" / "adaptive-control.md").read_text(encoding="utf-8")
    intervals = re.findall(r"\[\d+\.\d+, \d+\.\d+\]", text)
    assert len([found for found in figures(text) if "an interval" in found]) == len(intervals) > 100


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_have_no_figure_that_is_typed_by_hand(path: Path) -> None:
    assert figures(path.read_text(encoding="utf-8")) == [], (
        f"{path.relative_to(ROOT)}: link to a page of docs/results instead, cite arXiv in the same paragraph, or mark what "
        f"the code defines with the line {ALLOWED} before"
    )


def test_readme_has_no_figure_that_is_typed_by_hand() -> None:
    assert figures((ROOT / "README.md").read_text(encoding="utf-8")) == []
