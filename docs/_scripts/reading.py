"""Change pages as Sphinx reads them: describe agents, and link papers.

`<!-- agents -->` becomes the table of all agents, `<!-- agent: NAME -->` what that agent is, with a table of its
hyper-parameters, and `<!-- hyper-parameters: stable-baselines3 -->` the table of those that all algorithms of
Stable-Baselines3 share; "arXiv 2211.17192" becomes a link.
"""

from __future__ import annotations

import re
from typing import Any

from _scripts import agents


def on_source_read(_: Any, page: str, source: list[str]) -> None:
    """Describe the agents that a page names, and link the papers, in the text that Sphinx has read."""
    text = re.sub(r"^<!-- agent: (\S+) -->$", lambda found: agents.described(found[1]), source[0], flags=re.MULTILINE)
    if "<!-- agents -->" in text:
        text = text.replace("<!-- agents -->", agents.overview())
    text = text.replace("<!-- hyper-parameters: stable-baselines3 -->", agents.shared_by_algorithms())
    pieces = re.split(r"(^ *```.*?^ *```$|`[^`\n]+`)", text, flags=re.MULTILINE | re.DOTALL)  # every second one is code
    source[0] = "".join(piece if number % 2 else linked(piece) for number, piece in enumerate(pieces))


def linked(text: str) -> str:
    """Return a text whose papers are links."""
    return re.sub(r"(?<!\[)\barXiv:? ?(\d{4}\.\d{4,5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
