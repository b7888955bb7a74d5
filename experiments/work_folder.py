"""Work folders: each belongs to the settings that it was begun with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from spec_envs.files import LOCK, read_json, write_json

NOTE = "settings.json"


def claim(folder: Path, settings: Mapping[str, object], option: str) -> None:
    """Note in a folder the settings that its contents are made with. The folder is made if it does not exist.

    Args:
        option: command-line option that names the folder, for the error.

    Raises:
        ValueError: the folder was begun with other settings, or holds other files.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
