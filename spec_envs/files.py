"""Files that are there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends, and is removed if it fails.

    Raises:
        OSError: the file could not be written (a full disk, say); the sentence names it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:  # KeyboardInterrupt too: clean up, then raise on
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or "No space left" in str(error):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise OSError(f"could not write {path}: {reason}; free some space or choose another folder") from error
        raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")
