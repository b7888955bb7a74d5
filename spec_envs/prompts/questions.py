"""Questions: the user turns of question.jsonl files and of data sets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from spec_envs.files import at_home
from spec_envs.prompts.conversations import Turn, asked
from spec_envs.prompts.rows import check_values, lines, parsed, read_bytes, split_of
from spec_envs.text import encodable, reason

LOG = logging.getLogger(__name__)
COLUMNS = (  # of a data set; the first of these that it has holds the prompts
    *("turns", "prompt", "messages", "conversations", "question", "instruction", "article", "document", "text"),
)


def read_questions(path: Path) -> list[Turn]:
    """Return the first turns of a question.jsonl file.

    Later turns are left out; a warning is logged with their number.

    Raises:
        ValueError: the file cannot be read or has no question, or a line is not a question; the sentence names file and
            line.
    """
    turns, later = [], []
    for number, line in lines(read_bytes(path, "questions")):
        try:
            row = parsed(line)
            check_values(row)
            if not isinstance(row, dict) or "turns" not in row:
                raise ValueError("it has no turns")
            found, more = first_turns(row["turns"])
            turns += [turn._replace(split=split_of(row, turn.text)) for turn in found]
        except ValueError as error:
            raise ValueError(
                f'{path}:{number} is not a question; expected {{"turns": ["…"]}} on one line in UTF-8, but {error}'
            ) from None
        later.append(more)
    if not turns:
        raise ValueError(f'{path} holds no question; expected {{"turns": ["…"]}} on each line')
    log_later_turns(path, later)
    return turns


def read_data_set(name: str) -> list[Turn]:
    """Return the user turns of a data set on the hub, ``org/name@configuration:column`` (the last two optional), or of
    a local folder, ``folder:column``.

    Rows without a prompt are left out; a warning is logged with their number.

    Raises:
        ValueError: there is no such data set or column, or no prompt in it.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{name} is a data set on the hub: install the extra `datasets`, as in pip install 'spec-envs[datasets]'"
        ) from None
    place, _, column = name.partition(":")
    folder = at_home(place)
    identifier, _, configuration = (str(folder), "", "") if folder.is_dir() else place.partition("@")
    try:
        splits = load_dataset(identifier, configuration or None)  # this version runs no code of a data set
    except Exception as error:  # the library raises exceptions of many kinds
        raise ValueError(f"cannot load the data set {identifier!r} from the hub: {reason(error)}") from None
    parts = list(splits.values())
    shared = [c for c in (parts[0].column_names if parts else []) if all(c in part.column_names for part in parts)]
    column = column or next((c for c in COLUMNS if c in shared), "")
    if column not in shared:
        raise ValueError(f"{identifier} has no column {column!r} of prompts; name one: {place}:{'|'.join(shared)}")
    values = (row[column] for part in parts for row in part.select_columns([column]))
    return column_turns(values, f"{identifier}:{column}")


def column_turns(values: Any, name: str) -> list[Turn]:
    """Return the user turns of a data set's column.

    Raises:
        ValueError: no row holds a prompt.
    """
    turns, later, refused = [], [], []
    total = 0
    for total, value in enumerate(values, 1):
        try:
            found, more = first_turns(value)
        except ValueError as error:
            refused.append(f"row {total}: {error}")
            continue
        turns += [turn._replace(split=split_of({}, turn.text)) for turn in found]
        later.append(more)
    if not turns:
        seen = f"; {refused[0]}" if refused else ""
        raise ValueError(f"{name} holds no prompt; expected texts, lists of texts or chat messages{seen}")
    if refused:
        LOG.warning("%s: left out %d of %d rows that hold no prompt (%s)", name, len(refused), total, refused[0])
    log_later_turns(name, later)
    return turns


def first_turns(value: Any) -> tuple[list[Turn], int]:
    """Return the user turns of a text, a list of texts or a list of chat messages, and how many turns were left out.

    Of several texts only the first is taken, because the later ones need the model's own answer to it.

    Raises:
        ValueError: the value is none of these, or empty.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return asked(value), 0
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a text, a list of texts or of chat messages")
    if not texts[0].strip():
        raise ValueError("the text is empty")
    return [Turn(encodable(texts[0]), (), "")], len(texts) - 1


def log_later_turns(name: Path | str, later: list[int]) -> None:
    """Log how many turns after the first ones were left out."""
    if any(later):
        LOG.warning(
            "%s: left out %d later turns of %d questions, which need the model's own answer to the first",
            *(name, sum(later), sum(map(bool, later))),
        )
