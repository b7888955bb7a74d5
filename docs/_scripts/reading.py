"""Change pages as Sphinx reads them: describe agents, and link papers.

`<!-- agent: NAME -->` becomes what the agent is, with a table of its hyper-parameters; "arXiv 2211.17192" becomes a link.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from spec_envs.agents import AGENTS


def on_source_read(_: Any, page: str, source: list[str]) -> None:
    """Describe the agents that a page names, and link the papers, in the text that Sphinx has read."""
    text = re.sub(r"^<!-- agent: (\S+) -->$", lambda found: described(found[1]), source[0], flags=re.MULTILINE)
    source[0] = re.sub(r"(?<!\[)\barXiv:? ?(\d{4}\.\d{5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def described(name: str) -> str:
    """Return heading, description and hyper-parameters of an agent, in Markdown."""
    kind = AGENTS[name]
    text = re.split(r"\n(?:Args|Attributes|Raises):\n", inspect.getdoc(kind) or "")[0]
    rows = [
        f"| `{key}` | {kind.Settings.expected(key)} | {default(field)} | {field.description} |".replace("``", "`")
        for key, field in kind.Settings.model_fields.items()
    ]
    head = ["| hyper-parameter | takes | default | meaning |", "|---|---|---|---|"] if rows else []
    return "\n".join([f"## `{name}`", "", text.replace("``", "`"), "", *head, *rows, ""])


def default(field: Any) -> str:
    """Return the default of a hyper-parameter."""
    return "required" if field.is_required() else f"`{field.default!r}`"
