"""The kind of text that is being written, detected from its characters."""

from __future__ import annotations

import re
from collections.abc import Callable

from spec_envs.decoding.engine import Engine

SNIPPET, FRESH = 96, 16  # last tokens that decide the kind of a text, and new tokens after which it is detected again
OPENING, JSON = 8, ("{", "```json", "```\n{")  # leading tokens of an answer that decide whether it is JSON as a whole
KINDS = ("code", "prose", "math", "json", "list")
CODE_CHARACTERS, CODE_SHARE = frozenset("{}()[];:"), 0.05
MATH_SIGNS, MATH_WORDS = frozenset("∑∀∃→⇒∫"), re.compile(r"\b(therefore|proof)\b", re.IGNORECASE)
ITEM = re.compile(r"^\s*([-*•]|\d+[.)])\s", re.MULTILINE)


def context_kind(snippet: str) -> str:
    """Return one of ``KINDS``, by the rules of dynamic speculation for llama.cpp and one for lists.

    JSON begins with ``{`` or has ``"type":``. Code has a code fence, or more than a twentieth of its characters are
    brackets, colons and semicolons. Mathematics has a sign of logic or analysis, or "therefore" or "proof". A list has
    two items or more. JSON is tried first, because it has many of code's characters.
    """
    if snippet.lstrip().startswith("{") or '"type":' in snippet:
        return "json"
    if "```" in snippet or sum(c in CODE_CHARACTERS for c in snippet) > CODE_SHARE * len(snippet):
        return "code"
    if not MATH_SIGNS.isdisjoint(snippet) or MATH_WORDS.search(snippet):
        return "math"
    return "list" if len(ITEM.findall(snippet)) >= 2 else "prose"


def kind_of_answer(tail: list[int], opening: list[int], detokenize: Callable[[list[int]], str]) -> str:
    """Return the kind of a text, detected from its last tokens and from the first ones of its answer."""
    if detokenize(opening).lstrip().startswith(JSON):
        return "json"
    return context_kind(detokenize(tail[-SNIPPET:]))


class TextKind:
    """The detected kind of the text under way, detected again after every ``FRESH`` new tokens."""

    def __init__(self) -> None:
        self.kind, self.at = "", 0

    def read(self, decoder: Engine) -> str:
        """Return one of ``KINDS``."""
        if not self.kind or decoder.length >= self.at + FRESH:
            tail = [*decoder.prompt[-SNIPPET:], *decoder.tokens]
            self.kind = kind_of_answer(tail, decoder.tokens[:OPENING], decoder.detokenize)
            self.at = decoder.length
        return self.kind
