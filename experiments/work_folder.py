"""Folders that belong to the settings that they were begun with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from spec_envs.files import LOCK, read_json, write_json

NOTE = "settings.json"


def claim(folder: Path, settings: Mapping[str, object], option: str) -> None:
    """Note what a folder that this process holds is for.

    Args:
        option: the option that names the folder, for the sentence.

    Raises:
        ValueError: it was begun with other settings, whose parts would not fit, or holds something else.
    """
    note, settings = folder / NOTE, json.loads(json.dumps(settings))
    if note.exists():
        found = read_json(note, f"delete {folder}, or choose another {option}")
        noted = found if isinstance(found, dict) else {}
        if differing := [key for key in dict.fromkeys([*settings, *noted]) if settings.get(key) != noted.get(key)]:
            raise ValueError(
                f"{folder} was begun with another {', '.join(differing)}; choose another {option}, or delete it"
            )
        return
    if others := sorted(path.name for path in folder.iterdir() if path.name != LOCK):
        raise ValueError(f"{folder} holds something else, {others[0]}; choose another {option}, or delete it")
    write_json(note, settings)
