"""Write the published results of adaptive control (`spec-envs results`).

This is `spec-envs bench adaptive` on the split `final` of the prompts, which nothing else draws from, at one committed
revision. Every use of that split is noted in docs/results/final-uses.json before its first text is decoded; the same
command continues a killed run and notes nothing again. Writes adaptive-control.json, adaptive-control.md and
adaptive-control.png into --out, results.json into --root, and RESULTS.md beside the README. `--fast` runs the small version
on the split `test` at any revision: it notes nothing, and its files are adaptive-control-fast.*, results-fast.json, and
RESULTS-fast.md in --out. With the environment variable `RAY=1` it records and trains on Ray.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from spec_envs.experiments.benchmark import report
from spec_envs.experiments.benchmark.__main__ import benchmark, parser_of, problems_of
from spec_envs.experiments.benchmark.findings import Benchmark, Findings
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.measure.encoding import from_json, to_json
from spec_envs.experiments.measure.machine import revision
from spec_envs.experiments.measure.results import AGAIN, Verdict
from spec_envs.experiments.reports.pages import counted, table
from spec_envs.files import read_json, whole, write_json
from spec_envs.prompts.rows import FINAL

CLONE = Path(__file__).resolve().parents[2]
OUT, USES = Path("docs/results"), Path("docs/results/final-uses.json")  # in the clone
RATIOS = ("over_static", "low", "high", "over_plain")
PAGE = replace(report.PAGE, command="results")


@dataclass(frozen=True)
class Use:
    """A use of the final split: the revision that was measured, the day (UTC), and the problems."""

    revision: str
    date: str
    problems: list[str]


def main() -> None:
    with one_sentence("interrupted; the same command continues with what is not trained yet"):
        parser = parser_of(__doc__, out=None, shown=f"{OUT} of the clone; fast: runs/bench")
        args = parser.parse_args()
        args.out = args.out or (Path("runs/bench") if args.fast else CLONE / OUT)
        if args.from_json:
            check_published(args.from_json)
        name = "adaptive-control-fast" if args.fast else "adaptive-control"
        results = PAGE.publish(args, lambda: measured(args), name)
        page = (args.from_json or args.out / f"{name}.json").with_suffix(".md")
        figures = args.root / ("results-fast.json" if results.fast else "results.json")
        summary = page.parent / "RESULTS-fast.md" if results.fast else CLONE / "RESULTS.md"
        figures.parent.mkdir(parents=True, exist_ok=True)
        write_json(figures, figures_of(results))
        with whole(summary) as temporary:
            temporary.write_text("\n".join(summary_of(results, os.path.relpath(page, summary.parent))) + "\n", "utf-8")
        print(f"written: {figures}, {summary}")


def measured(args: argparse.Namespace) -> Benchmark:
    """Return the findings on every problem: on the final split at one committed revision, or of the small version.

    Raises:
        ValueError: the revision is unknown, or files differ from it.
    """
    if args.fast:
        return benchmark(args, args.root / "fast")
    measuring = revision()
    if measuring == "unknown" or measuring.endswith("-dirty"):
        raise ValueError(
            f"published results are of one committed revision, and this one is {measuring}; commit what differs in a "
            "clone of the repository, or give --fast"
        )
    uses = noted(measuring, problems_of(args))
    found = benchmark(args, args.root / "results" / measuring, FINAL)
    return replace(found, final_uses=uses)


def noted(measuring: str, problems: Sequence[str]) -> int:
    """Note that a revision is measured on the final split, unless the same revision was on the same problems, and return
    how often that split was used."""
    file = CLONE / USES
    uses = [from_json(Use, one) for one in read_json(file, f"restore it with git checkout {USES}")]
    if not any(use.revision == measuring and set(use.problems) == set(problems) for use in uses):
        uses.append(Use(measuring, f"{datetime.now(UTC):%Y-%m-%d}", list(problems)))
        write_json(file, to_json(uses))
    return len(uses)


def check_published(path: Path) -> None:
    """Refuse figures of the split ``test`` that are not of the small version.

    Raises:
        ValueError: the message names their file.
    """
    results = PAGE.read(path)[1]
    if results.final_uses is None and not results.fast:
        raise ValueError(f"{path} is not of the split {FINAL}; expected a file that spec-envs results wrote")


def figures_of(results: Benchmark) -> dict[str, dict[str, Any]]:
    """Return the verdict on every arm of every problem, with what it was measured on, as results.json holds them."""
    found = {}
    for name, problem in results.problems.items():
        verdicts, references = problem.live.verdicts(), problem.references
        live, priced = verdicts["live"], verdicts["priced"]
        found[name] = {
            "static": {"setting": references.static, "over_plain": references.static_over_plain},
            "arms": {
                arm: {"priced": {key: vars(priced[arm])[key] for key in RATIOS}, "live": vars(live[arm])}
                for arm in compared(problem)
            },
            "clairvoyant": references.clairvoyant,
            "revision": problem.live.machine.revision,
            "processor": problem.live.machine.processor,
            "final_uses": results.final_uses,
        }
    return found


def compared(problem: Findings) -> list[str]:
    """Return the names of the arms that are compared with the best static setting."""
    return [name for name in problem.live.arms if name not in ("plain", "static") and not name.endswith(AGAIN)]


def summary_of(results: Benchmark, page: str) -> Iterable[str]:
    """Yield the lines of RESULTS.md; ``page`` is the path from there to the page with all figures."""
    yield from ("<!-- Written by `spec-envs results`. Do not edit. -->", "", "# Results of adaptive control", "")
    yield from report.conditions(results)
    yield (
        "Throughput over that of S*, the best static setting, with its 95 % interval over texts: priced by this machine's "
        "cost table, and live by its clock. C* is the clairvoyant optimum, which no policy can reach. Of an arm with "
        f"several seeds the one that is fastest on validation texts plays. [All figures]({page})."
    )
    for name, problem in results.problems.items():
        yield from ("", f"## {name}", "", *of_problem(problem, results.final_uses))


def of_problem(problem: Findings, uses: int | None) -> list[str]:
    """Return the lines of RESULTS.md about one problem."""
    verdicts, references, made = problem.live.verdicts(), problem.references, problem.live.machine
    rows = [[f"`{arm}`", *(cell(verdicts[kind][arm]) for kind in ("priced", "live"))] for arm in compared(problem)]
    used = "" if uses is None else f", use {uses} of that split"
    return [
        f"S* is {report.named(references.static)}, which makes {references.static_over_plain:.3f} of plain decoding; C* makes "
        f"{references.clairvoyant:.3f} of S* (recorded texts, priced).",
        "",
        *table(["arm", "priced over S*", "live over S*"], rows),
        "",
        *(line for sentence in report.disagreements(problem.live) for line in (sentence, "")),
        f"Revision {made.revision}; {made.processor}, {counted(made.threads, 'thread')}; {problem.live.prompts} texts of the "
        f"split `{problem.settings.held_out}`{used}; {counted(problem.settings.seeds, 'seed')}{report.fewer(problem)}.",
    ]


def cell(verdict: Verdict) -> str:
    """Return a verdict as a cell of a table."""
    return "void" if verdict.void else f"{verdict.over_static:.3f} [{verdict.low:.3f}, {verdict.high:.3f}]"


if __name__ == "__main__":
    main()
