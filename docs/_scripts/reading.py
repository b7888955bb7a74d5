"""Link papers in pages as Sphinx reads them: "arXiv 2211.17192" becomes a link."""

from __future__ import annotations

import re
from typing import Any


def on_source_read(_: Any, page: str, source: list[str]) -> None:
    """Link the papers in the text that Sphinx has read."""
    pieces = re.split(
        r"(^ *```.*?^ *```$|`[^`\n]+`)", source[0], flags=re.MULTILINE | re.DOTALL
    )  # every second one is code
    source[0] = "".join(piece if number % 2 else linked(piece) for number, piece in enumerate(pieces))


def linked(text: str) -> str:
    """Return a text whose papers are links."""
    return re.sub(r"(?<!\[)\barXiv:? ?(\d{4}\.\d{4,5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
