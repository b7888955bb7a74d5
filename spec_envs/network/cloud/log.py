"""Lines of a log of which strangers cannot make many."""

from __future__ import annotations

import logging
import time

EVERY = 10.0  # seconds


class Sparse:
    """Logs a line of one kind at most every ten seconds, with how many were left out since the last one.

    Args:
        logger: where lines go.
        every: seconds between two lines of a kind.
    """

    def __init__(self, logger: logging.Logger, every: float = EVERY):
        self.logger, self.every = logger, every
        self.last: dict[str, float] = {}
        self.left_out: dict[str, int] = {}

    def warn(self, kind: str, sentence: str, error: BaseException | None = None) -> None:
        """Log a sentence, and the traceback of an error that nobody expected. There are to be few kinds."""
        now = time.monotonic()
        if now - self.last.get(kind, -self.every) < self.every:
            self.left_out[kind] = self.left_out.get(kind, 0) + 1
            return
        self.last[kind], left_out = now, self.left_out.pop(kind, 0)
        more = f" ({left_out} more like this)" if left_out else ""
        self.logger.warning("%s%s", sentence, more, exc_info=error)
