"""Conversations between a person and a model. Each turn of the person is a prompt, with the turns before it.

A turn is a chat message, ``{"role": "user", "content": "…"}``, or one of ShareGPT, ``{"from": "human", "value": "…"}``;
``role`` or ``from`` is ``user`` or ``human``, ``assistant`` or ``gpt``, or ``system`` (first). A content may be a list
of parts, ``{"type": "text", "text": "…"}``. A log is a JSON array of conversations, or has one on each line (JSONL), in
ShareGPT's format: ``{"conversations": [turn, …]}``, or with ``messages`` in its place. A row may state its ``split``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spec_envs.files import whole
from spec_envs.prompts.rows import NO_JSON, check_values, lines, parsed, read_bytes, split_of
from spec_envs.text import encodable

LOG = logging.getLogger(__name__)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SUFFIXES = (".json", ".jsonl")
MOST_TURNS = 1000  # of a conversation: each is a prompt with all before it


class Turn(NamedTuple):
    """A turn of a person: its text, the turns before it (role and text), and the split of its conversation."""

    text: str
    history: tuple[tuple[str, str], ...]
    split: str


def is_log(name: str) -> bool:
    """Return whether a prompt set's name is the path of a log."""
    return name.endswith(SUFFIXES)


def read_log(path: Path) -> list[Turn]:
    """Return the turns of the persons in a log, in order.

    Rows that are no conversation are left out; a warning is logged with their number.

    Raises:
        ValueError: the file cannot be read, or there is no conversation in it.
    """
    turns: list[Turn] = []
    refused: list[str] = []
    total, first = 0, ""
    for place, row in rows(path):
        total += 1
        try:
            turns += conversation(parsed(row) if isinstance(row, bytes) else row)
        except ValueError as error:
            first = first or str(error)
            refused.append(place)
    if not turns:
        raise ValueError(
            f'{path} holds no conversation; expected {{"conversations": [{{"from": "human", "value": "…"}}, …]}} on '
            f"each line, or an array of these{f' ({refused[0]}: {first})' if refused else ''}"
        )
    if refused:
        shown = ", ".join(refused[:3]) + (", …" if len(refused) > 3 else "")
        LOG.warning(
            "%s: left out %d of %d rows that are no conversation (%s): %s", path, len(refused), total, shown, first
        )
    return turns


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each with its place: the parsed elements of an array, or else the lines as bytes."""
    data = read_bytes(path, "conversations")
    if data.lstrip().startswith(b"["):
        try:
            yield from ((f"row {i}", row) for i, row in enumerate(parsed(data), 1))
            return
        except ValueError as error:
            if str(error) != NO_JSON:
                raise ValueError(f"cannot read the conversations {path}: {error}") from None
    yield from ((f"line {number}", line) for number, line in lines(data))


def conversation(row: Any) -> list[Turn]:
    """Return the turns of a person in a row of a log.

    Raises:
        ValueError: it is no conversation.
    """
    check_values(row)
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    turns = asked(row.get("conversations", row.get("messages")))
    opening = next(text for role, text in (*turns[0].history, ("user", turns[0].text)) if role == "user")
    split = split_of(row, opening)
    return [turn._replace(split=split) for turn in turns]


def asked(messages: Any) -> list[Turn]:
    """Return the person's turns among messages, with an empty split.

    Raises:
        ValueError: they are not messages of a person and a model in turn, or none is a person's.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("it has no list of turns")
    if len(messages) > MOST_TURNS:
        raise ValueError(f"it has {len(messages)} turns, expected at most {MOST_TURNS}")
    said = [message(turn) for turn in messages]
    if not all(text.strip() for _, text in said):
        raise ValueError("a turn is empty")
    speakers = [role for role, _ in said[1 if said[0][0] == "system" else 0 :]]
    if not speakers or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(speakers)):
        raise ValueError("its turns are out of order, expected user and assistant in turn, and system first if at all")
    return [Turn(text, tuple(said[:i]), "") for i, (role, text) in enumerate(said) if role == "user"]


def message(turn: Any) -> tuple[str, str]:
    """Return role and text of a message.

    Raises:
        ValueError: it is not a message, or its content is not text.
    """
    if not isinstance(turn, dict):
        raise ValueError("a turn is no object")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"the role of a turn is {str(role)[:40]!r}, expected one of {', '.join(ROLES)}")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("the content of a turn is no text")
    return ROLES[role], encodable("\n".join(map(str, texts)))


def write_log(path: Path, texts: Sequence[str], split: str) -> None:
    """Write conversations of one user turn each."""
    with whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for text in texts:
            row = {"conversations": [{"from": "human", "value": text}], "split": split}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
