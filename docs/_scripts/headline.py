"""Write the README's paragraph and picture of results from the data of the pages in docs/results.

    .venv/bin/python docs/_scripts/headline.py

Run it after a page that it reads was measured again; a test compares the README with the data.
"""

from __future__ import annotations

from pathlib import Path

from spec_envs.experiments.comparisons import chains, decoding
from spec_envs.experiments.measure.results import AGAIN
from spec_envs.experiments.reports.figures import draw_arms, drawn

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
OTHERS = {"plain_over_llamacpp": "llama.cpp", "plain_over_transformers": "transformers"}


def paragraph(results: Path) -> str:
    """Return three sentences about the data in a folder, with the picture above them."""
    speeds, lengths = decoding.PAGE.read(results / "decoding.json")[1], chains.PAGE.read(results / "chains.json")[1]
    machine = speeds.table.machine
    beside = [
        f"{speeds.table.ratios[key]:.2f} times {name}" for key, name in OTHERS.items() if key in speeds.table.ratios
    ]
    gain = lengths.best_agent_over_best_fixed
    fixed = {name: row for name, row in lengths.arms.items() if name.startswith("K = ")}
    fastest = max(fixed, key=lambda name: fixed[name].tokens_per_second)
    return "\n".join(
        [
            "![Throughput over plain decoding: beside other software, and with chosen draft lengths]"
            "(docs/results/headline.png)",
            "",
            f"On {machine.processor} ({machine.threads} threads, {machine.dtype}), plain decoding of {speeds.target} is "
            f"{' and '.join(beside)} on the same weights, and the best static speculation is "
            f"{speeds.table.ratios['static_over_plain']:.2f} times plain decoding ([decoding speed](docs/results/decoding.md)).",
            f"With chains, the best fixed draft length, {lengths.best_fixed}, is {lengths.best_fixed_over_plain:.2f} "
            "times plain decoding ([draft lengths](docs/results/chains.md)).",
            f"The agent that decides it best on validation prompts, `{lengths.best_agent}`, is {gain:.2f} times as fast as "
            f"that length, which training prompts have chosen; {fastest}, the fastest fixed length on these very prompts, "
            f"is {fixed[fastest].over[chains.BEST]:.2f} times as fast.",
            "",
            "In brackets: 95 % intervals; [how a number is made](docs/results/index.md#how-a-number-is-made).",
        ]
    )


def draw(results: Path, path: Path) -> None:
    """Draw the throughput over plain decoding of the arms of both pages."""
    speeds, lengths = decoding.PAGE.read(results / "decoding.json")[1], chains.PAGE.read(results / "chains.json")[1]
    shown = ("plain", chains.BEST, lengths.best_agent)
    with drawn(path, 11, 2.8) as figure:
        left, right = figure.subplots(1, 2)
        draw_arms(left, {name: row for name, row in speeds.table.arms.items() if not name.endswith(AGAIN)}, "plain")
        draw_arms(right, {name: lengths.arms[name] for name in shown}, "plain")
        for axes in (left, right):
            axes.set_xlim(right=1.1 * axes.get_xlim()[1])  # room for the figures
        left.set_title("decoding speed", fontsize=10)
        right.set_title("draft lengths", fontsize=10)


def inserted(text: str, content: str) -> str:
    """Return a text with the content between its marks replaced.

    Raises:
        ValueError: the text does not have both marks.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text does not have the lines {BEGIN} and {END} once each; add them")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n{content}\n{END}{text.partition(END)[2]}"


def main() -> None:
    draw(RESULTS, RESULTS / "headline.png")
    README.write_text(inserted(README.read_text(encoding="utf-8"), paragraph(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
