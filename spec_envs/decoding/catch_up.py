"""The rows of a drafter's forward: it catches up with the text, and with those tokens of its own chain that no
forward has read yet, because they were copied or because nothing was drafted after them.

Every function takes whole numbers or arrays of them.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Count = TypeVar("Count", int, np.ndarray)


def rows(unread: Count, drafted: Count, read: Count | int = 0) -> Count:
    """Return the rows of a forward: the tokens of the text that are unread, and the drafted ones that are not
    ``read``."""
    needed: Count = unread + drafted - read
    return needed


def left_unread(unread: Count, read: Count, emitted: Count, right: Count) -> Count:
    """Return how many tokens of the text no forward has read after a cycle.

    Args:
        unread: tokens of the text that were unread at its end.
        read: drafted tokens that a forward has read.
        emitted: tokens that joined the text; the last one is the target's own, even where the drafter had it too.
        right: how many of the first drafted tokens are the text's.
    """
    left: Count = unread + emitted - kept(read, emitted, right)
    return left


def kept(read: Count, emitted: Count, right: Count) -> Count:
    """Return how many drafted tokens that were read are now part of the text, and need not be read again."""
    known: Count = np.minimum(np.minimum(read, emitted - 1), right)
    return known
