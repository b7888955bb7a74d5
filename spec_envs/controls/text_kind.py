"""What kind of text is being written, told from its characters."""

from __future__ import annotations

import re

KINDS = ("code", "prose", "math", "json", "list")
CODE_CHARACTERS, CODE_SHARE = frozenset("{}()[];:"), 0.05
MATH_SIGNS, MATH_WORDS = frozenset("∑∀∃→⇒∫"), re.compile(r"\b(therefore|proof)\b", re.IGNORECASE)
ITEM = re.compile(r"^\s*([-*•]|\d+[.)])\s", re.MULTILINE)


def context_kind(snippet: str) -> str:
    """One of ``KINDS``: the detector of dynamic speculation for llama.cpp, and lists.

    JSON begins with ``{`` or has ``"type":``. Code has a code fence, or more than a twentieth of its characters are
    brackets, colons and semicolons. Mathematics has a sign of logic or analysis, or "therefore" or "proof". A list has
    two items or more. JSON is asked for first: it consists of code's characters.
    """
    if snippet.lstrip().startswith("{") or '"type":' in snippet:
        return "json"
    if "```" in snippet or sum(c in CODE_CHARACTERS for c in snippet) > CODE_SHARE * len(snippet):
        return "code"
    if not MATH_SIGNS.isdisjoint(snippet) or MATH_WORDS.search(snippet):
        return "math"
    return "list" if len(ITEM.findall(snippet)) >= 2 else "prose"
