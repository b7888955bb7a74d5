"""How every command ends: with its result, or with one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_sentence(interrupted: str = "interrupted") -> Iterator[None]:
    """Turn what a user can mend, and Ctrl-C, into a sentence and an exit status of 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(interrupted)
