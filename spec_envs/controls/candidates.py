"""Values that a search of the best static setting tries."""

from __future__ import annotations

DEPTHS = (1, 2, 3, 4, 6, 8)
BUDGETS = (3, 7, 11, 15, 23, 31)
KS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24)
START = {"depth": 2, "budget": 7}  # from which a search over two axes begins


def depths(max_depth: int) -> list[int]:
    """Return the depths to try in a tree of ``max_depth``."""
    return [depth for depth in DEPTHS if depth <= max_depth]
