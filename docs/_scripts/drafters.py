"""Describe the shipped drafters in Markdown, from the report beside each, and kinds of drafters side by side."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

from _scripts.pages import DOCS, table
from spec_envs.experiments.comparisons.drafters import CHAINS, PAGE, TREES, Drafters
from spec_envs.experiments.measure.results import Row
from spec_envs.files import DATA

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SPEEDS = DOCS / "results" / "drafters.json"  # in which these drafters are arms
ONE_PASS = DOCS / "assets" / "drafters"  # reports of drafters of each kind after one pass over the same text
FACTS = {  # keys of a report, and what they are called
    "answer_tokens": "answer tokens of the text",
    "tokens_seen": "tokens seen in training, prompts included",
    "epochs": "passes over the text, of the last command",
    "minutes": "minutes of training",
    "draft_vocab": "tokens of the shortlist",
    "weights": "weights in trained matrices",
}


def filled(text: str) -> str:
    """Return the text of a page with the reports of all shipped drafters between its marks."""
    shipped = {path.parent.name: read(path) for path in sorted((DATA / "drafters").glob("*/report.json"))}
    kinds = [read(path) for path in sorted(ONE_PASS.glob("*.json"))]
    block = f"{BEGIN}\n\n{described(shipped)}\n\n{side_by_side(kinds, PAGE.read(SPEEDS)[1])}\n\n{END}"
    return re.sub(rf"{BEGIN}.*?{END}", lambda _: block, text, flags=re.DOTALL)


def read(path: Path) -> dict[str, Any]:
    """Return a report."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def described(found: dict[str, dict[str, Any]]) -> str:
    """Return tables of how drafters were made, of their acceptance, and of their curves."""
    names = [f"`{name}`" for name in found]
    facts = [(label, *(number(in_all(report, key)) for report in found.values())) for key, label in FACTS.items()]
    depth = max(len(report["chain_acceptance"]) for report in found.values())
    chains = [(str(n + 1), *(number(report["chain_acceptance"][n]) for report in found.values())) for n in range(depth)]
    parts = [
        table(("", *names), facts),
        "Acceptance on held-out text of the kinds that they learned from, by tokens of the chain:",
        table(("tokens", *names), chains),
        *(detailed(name, report) for name, report in found.items() if "curve" in report),
    ]
    return "\n\n".join(parts)


def in_all(report: dict[str, Any], key: str) -> float | None:
    """Return a figure of a report; of what each command adds, the sum over all commands that made the drafter."""
    earlier = [run[key] for run in report.get("earlier", ()) if key in run]
    return round(sum(earlier, report[key]), 2) if key in report else None


def detailed(name: str, report: dict[str, Any]) -> str:
    """Return the commands that made a drafter, its acceptance by kind, and its last curve."""
    commands = "\n".join(run["command"] for run in (*report.get("earlier", ()), report) if "command" in run)
    rows = [
        (kind, where, str(figures["positions"]), *(number(figures["chain_acceptance"][n]) for n in (0, 1, 2, 3, 7)))
        for where, key in (("held out", "held_out"), ("validation", "validation"))
        for kind, figures in report[key].items()
    ]
    lines = report["curve"]
    every = -(-len(lines) // 12)  # a dozen rows
    curve = [
        (number(line["tokens"]), number(line["minutes"]), number(line["loss"]), number(line["accepted"]))
        for line in lines[::-every][::-1]  # with the last one
    ]
    return "\n\n".join(
        (
            f"### {name}",
            f"```text\n{commands}\n```",
            table(("kind", "text", "positions", "1 token", "2", "3", "4", "8"), rows),
            "The curve of the last command; accepted are tokens of a chain of four on the validation text:",
            table(("tokens seen", "minutes", "loss", "accepted"), curve),
        )
    )


def side_by_side(found: list[dict[str, Any]], compared: Drafters) -> str:
    """Return a table of the acceptance of drafters of several kinds on the validation text, and of their speed.

    Args:
        compared: a comparison in which these drafters are arms.
    """
    depth = min(len(report["chain_acceptance"]) for report in found)
    rows = [(label, *(number(report.get(key)) for report in found)) for key, label in FACTS.items()]
    for n in range(depth):
        shares = ([kind["chain_acceptance"][n] for kind in report["validation"].values()] for report in found)
        rows.append((tokens(n + 1), *(number(round(mean(each), 3)) for each in shares)))
    for what in (TREES, CHAINS):
        rows.append((f"tokens per second{what}", *(speed(compared.arms, folder_of(report), what) for report in found)))
    commands = "\n".join(report["command"] for report in found)
    void = "" if compared.quiet else ", where the check of timings was not passed: the machine was busy"
    return "\n\n".join(
        (
            "### Kinds of drafters over the same text",
            "A drafter of each kind after one pass over the same text: how often a chain of so many tokens is right on the "
            "validation text, where every kind of request counts the same. A parallel head drafts the whole chain with one "
            "forward, the others take one for each token. Without `--init` a drafter begins as layers of the target, with it "
            "as the drafter of the release before, which had learned from less and narrower text. The last rows are the tokens "
            "per second of the best static setting of each on held-out shipped prompts, and in brackets their ratio to "
            f"plain decoding, from [drafters side by side](../results/drafters.md){void}.",
            f"```text\n{commands}\n```",
            table(("", *(f"`{report['kind']}`" for report in found)), rows),
        )
    )


def folder_of(report: dict[str, Any]) -> str:
    """Return the folder into which the command of a report has written the drafter."""
    words = shlex.split(report["command"])
    return words[words.index("--out") + 1] if "--out" in words else f"runs/drafter/{report['kind']}"


def speed(arms: dict[str, Row], name: str, what: str) -> str:
    """Return the throughput of a drafter's trees or chains, and over plain decoding, or a dash where it drafts none."""
    row = arms.get(name + what) or (arms.get(name) if what == CHAINS else None)
    return f"{row.tokens_per_second:.0f} ({row.over['plain']:.2f})" if row else "—"


def tokens(count: int) -> str:
    """Return a number of tokens in words."""
    return "1 token" if count == 1 else f"{count} tokens"


def number(value: float | None) -> str:
    """Return a figure with separators, or a dash where a report does not have it."""
    if value is None:
        return "—"
    return f"{value:.3f}" if isinstance(value, float) and value < 1 else f"{value:,}"
