"""Logs of conversations in ShareGPT's format: several turns, by person and model in turn.

A file is a JSON array of conversations, or has one on each line (JSONL):
``{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}``, where ``from`` may also be
``system`` (first), ``user`` or ``assistant``. A row may state its ``split``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spec_envs.files import whole

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SUFFIXES = (".json", ".jsonl")


class Turn(NamedTuple):
    """What a person said, what was said before (role and text), what the conversation began with, and its split."""

    text: str
    history: tuple[tuple[str, str], ...]
    opening: str
    split: str | None


def is_log(name: str) -> bool:
    """Whether a prompt set's name is that of a log."""
    return name.endswith(SUFFIXES)


def read_log(path: Path) -> list[Turn]:
    """The turns of a log that a model answered or was to answer, in order. What is no conversation is left out, and how
    many of them there were is said in one line.

    Raises:
        ValueError: no such file, or no conversation in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ValueError(f"cannot read the conversations {path}: {error.strerror or error}") from None
    turns: list[Turn] = []
    refused: list[str] = []
    total = 0
    for place, row in rows(text):
        total += 1
        try:
            turns += conversation(row)
        except (ValueError, KeyError, TypeError, AttributeError):
            refused.append(place)
    if not turns:
        raise ValueError(
            f'{path} holds no conversation; expected {{"conversations": [{{"from": "human", "value": "…"}}, …]}} on each '
            "line, or an array of these"
        )
    if refused:
        shown = ", ".join(refused[:3]) + (", …" if len(refused) > 3 else "")
        print(f"{path}: left out {len(refused)} of {total} rows that are no conversation ({shown})", file=sys.stderr)
    return turns


def rows(text: str) -> Iterator[tuple[str, Any]]:
    """Rows of a file and where they are; a line that is no JSON is a row of its text."""
    if text.lstrip().startswith("["):
        try:
            yield from ((f"row {i}", row) for i, row in enumerate(json.loads(text), 1))
            return
        except json.JSONDecodeError:
            pass
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028, too
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError:
                yield f"line {number}", line


def conversation(row: Any) -> list[Turn]:
    """The turns of a person in one conversation.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    said = [(ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
    speakers = [role for role, _ in said if role != "system"]
    if not all(isinstance(text, str) and text.strip() for _, text in said):
        raise ValueError("an empty turn")
    if any(role == "system" for role, _ in said[1:]) or any(
        role != ("user", "assistant")[i % 2] for i, role in enumerate(speakers)
    ):
        raise ValueError("turns out of order")
    opening = next(text for role, text in said if role == "user") if speakers else ""
    split = row.get("split")
    return [Turn(text, tuple(said[:i]), opening, split) for i, (role, text) in enumerate(said) if role == "user"]


def write_log(path: Path, texts: Sequence[str], split: str) -> None:
    """Conversations of one user turn each."""
    with whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for text in texts:
            row = {"conversations": [{"from": "human", "value": text}], "split": split}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
