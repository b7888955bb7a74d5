"""Describe the text that drafters learn from in Markdown, from the tables of which it is made."""

from __future__ import annotations

import re

from _scripts.agents import END, MARKED
from _scripts.pages import table
from spec_envs.experiments.drafters.selftext import FOLLOWING, FOLLOWING_SHARE, OWN, OWN_SHARE, SHIPPED
from spec_envs.experiments.drafters.text import composing
from spec_envs.experiments.drafters.text.packages import sources


def filled(text: str) -> str:
    """Return the text of a page with everything generated between its marks.

    `<!-- text: kinds -->` is followed by the table of the kinds of request, `<!-- text: sources -->` by that of the
    packages; each ends with `<!-- end -->`.
    """

    def fill(found: re.Match[str]) -> str:
        mark, kind, name = found.groups()
        return f"{mark}\n\n{TABLES[name]()}\n\n{END}\n" if kind == "text" else found[0]

    return MARKED.sub(fill, text)


def kinds() -> str:
    """Return the table of the kinds of request, with their shares of the turns and an example of each."""
    parts = composing.table("kinds.yml")
    composed = (1 - OWN_SHARE - FOLLOWING_SHARE) / sum(row["share"] for row in parts["training"].values())
    rows = [
        (f"`{OWN}`", share(OWN_SHARE), "the target writes the turn"),
        (f"`{FOLLOWING}`", share(FOLLOWING_SHARE), "a turn after an earlier answer"),
        *((f"`{kind}`", share(row["share"] * composed), example(row)) for kind, row in parts["training"].items()),
        (f"`{SHIPPED}`", "each once", "the shipped training prompts"),
        *((f"`{kind}`", "validation", example(row)) for kind, row in parts["validation"].items()),
    ]
    return table(("kind", "share of the turns", "example"), rows)


def share(part: float) -> str:
    """Return a share in percent."""
    return f"{100 * part:.0f} %"


def example(row: dict[str, list[str]]) -> str:
    """Return the first wording of a kind that is more than a slot and has no code in it."""
    wording = next(wording for wording in row["wordings"] if " " in wording and "`" not in wording)
    return f"`{' '.join(wording.split())}`"


def packages() -> str:
    """Return the table of the packages from which passages are cut."""
    rows = [(f"`{source.name}` {source.version}", source.about, source.license) for source in sources()]
    return table(("package of Debian 12", "what it is", "license"), rows)


TABLES = {"kinds": kinds, "sources": packages}
