"""A log that cannot be flooded from outside."""

from __future__ import annotations

import logging
import time

EVERY = 10.0  # seconds


class RateLimitedLog:
    """Logs at most one line of a kind every ten seconds, with the number of lines left out since the last one.

    Args:
        logger: receives the lines.
        every: seconds between two lines of a kind.
    """

    def __init__(self, logger: logging.Logger, every: float = EVERY):
        self.logger, self.every = logger, every
        self.last: dict[str, float] = {}
        self.left_out: dict[str, int] = {}

    def warn(self, kind: str, sentence: str, error: BaseException | None = None) -> None:
        """Log a sentence, and the traceback of an unexpected error.

        ``kind`` has to be one of a few names, because every kind has a line of its own.
        """
        now = time.monotonic()
        if now - self.last.get(kind, -self.every) < self.every:
            self.left_out[kind] = self.left_out.get(kind, 0) + 1
            return
        self.last[kind], left_out = now, self.left_out.pop(kind, 0)
        more = f" ({left_out} more like this)" if left_out else ""
        self.logger.warning("%s%s", sentence, more, exc_info=error)
