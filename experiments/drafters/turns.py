"""User turns that drafters and early exits learn from, without a data set.

Besides the turns that the target writes itself (``selftext.py``), there are the shipped training prompts and, for exits,
composed turns: to summarise texts that the target wrote, or to complete functions of Python's standard library. The
wordings of a drafter's text (``text/composing.py``) quote these functions, too.
"""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from spec_envs.prompts.sets import Prompt, in_turn, load_prompts

# Beginnings of some of the turns that the target writes, so that every kind of task occurs.
OPENINGS = (
    "Complete the following Python function.\n\ndef ",
    "Write a Python function that ",
    "Solve this problem step by step: ",
    "How many ",
    "Explain ",
    "Write a short ",
    *(
        f"{name} {verb} "
        for name in ("Maria", "A farmer", "Tom", "A shop", "Aisha")
        for verb in ("has", "buys", "sells")
    ),
)
SUMMARISE = (
    "Summarize the following article.\n\n{}",
    "Summarize: {}",
    "Summarize this text in one sentence.\n\n{}",
    "Give the gist of the article below in a single sentence.\n\n{}",
    "Read the text below and sum it up in three sentences.\n\n{}",
    "{}\n\nTL;DR",
)
COMPLETE = (
    "Complete the following Python function.\n\n{}\n",
    "Complete the code I provided.\n\n{}\n",
    "Implement this function.\n\n```python\n{}\n```",
    "Here is the start of a Python function. Continue it.\n\n{}\n",
)


def composed_turn(rng: random.Random, texts: Sequence[str]) -> str:
    """Return a request to summarise one to three of ``texts``, or to complete a function; each is half of the turns."""
    if texts and rng.random() < 0.5:
        article = "\n\n".join(rng.choices(texts, k=rng.choice((1, 1, 2, 3))))
        return rng.choice(SUMMARISE).format(article)
    return rng.choice(COMPLETE).format(rng.choice(library_functions()))


def shipped_prompts() -> list[Prompt]:
    """Return the shipped training prompts; tasks take turns."""
    return in_turn(load_prompts("all", "train"), 1)


@functools.cache
def library_functions() -> tuple[str, ...]:
    """Return the heads (signature and docstring) of functions of the standard library."""
    return tuple(head for head, _ in library())


@functools.cache
def library_sources() -> tuple[str, ...]:
    """Return the sources of the same functions, without their docstrings."""
    return tuple(source for _, source in library())


@functools.cache
def library() -> tuple[tuple[str, str], ...]:
    """Return the head of each documented function of the standard library, and its source without the docstring."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and 60 <= len(ast.get_docstring(node) or "") <= 600:
                start, docstring = node.lineno - 1, node.body[0]
                signature = lines[start : docstring.lineno - 1]
                head = lines[start : docstring.end_lineno]
                rest = lines[docstring.end_lineno or 0 : node.end_lineno]
                found.append(
                    tuple("\n".join(line[node.col_offset :] for line in part) for part in (head, signature + rest))
                )
    return tuple((head, source) for head, source in found)
