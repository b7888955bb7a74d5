"""Sizes of trees and numbers of nodes to verify, checked."""

from __future__ import annotations

from collections.abc import Sequence

LARGEST_TREE = 100_000  # nodes that are allocated before anything is drafted
LTD_CODE = tuple(range(10, 241, 10))
LTD_PAPER = tuple(range(20, 241, 20))
PUBLISHED = {"ltd": LTD_CODE, "ltd-paper": LTD_PAPER}


def offered(budgets: Sequence[int] | str, max_depth: int, width: int) -> tuple[int, ...]:
    """Return the budgets of a control, checked for a tree of that size.

    Args:
        budgets: ascending numbers of nodes, or one of the names in ``PUBLISHED``.

    Raises:
        ValueError: another name, numbers that do not ascend from 0 or more, or a tree without levels or nodes.
    """
    if isinstance(budgets, str):
        if budgets not in PUBLISHED:
            raise ValueError(f"budgets is {budgets!r}; expected numbers or one of {', '.join(PUBLISHED)}")
        budgets = PUBLISHED[budgets]
    if max_depth < 1 or width < 1:
        raise ValueError(f"max_depth and width are {max_depth} and {width}; expected at least 1")
    check_tree(max_depth, width)
    if not budgets or min(budgets) < 0 or max(budgets) > LARGEST_TREE or list(budgets) != sorted(set(budgets)):
        raise ValueError(f"budgets is {list(budgets)}; expected ascending numbers of nodes, up to {LARGEST_TREE}")
    return tuple(budgets)


def check_tree(max_depth: int, width: int) -> None:
    """Refuse trees that memory would not hold.

    Raises:
        ValueError: more nodes than ``LARGEST_TREE``.
    """
    if (nodes := width + width * width * max_depth) > LARGEST_TREE:
        raise ValueError(
            f"max_depth and width are {max_depth} and {width}, a tree of {nodes} nodes; expected at most {LARGEST_TREE}"
        )
