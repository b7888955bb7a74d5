"""The nodes of a decision tree over observations, as lists that decide in microseconds."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

LEAF, MIXED = -1, -1  # the feature of a leaf; the action of a node below which several are decided
KINDS = {
    "feature": torch.int32,
    "threshold": torch.float64,
    "left": torch.int32,
    "right": torch.int32,
    "action": torch.int32,
}


class Nodes(NamedTuple):
    """The nodes of a decision tree, the root first and each before those below it.

    ``feature``: index of the observation's number that is compared; ``LEAF`` where nothing is. ``threshold``: the
    largest number that leads to the node ``left``; larger ones lead to ``right``. ``action``: what a leaf decides.
    """

    feature: list[int]
    threshold: list[float]
    left: list[int]
    right: list[int]
    action: list[int]

    @classmethod
    def path(cls, comparisons: int) -> Self:
        """Return a tree that makes so many comparisons and then decides for the action 0, whatever it sees."""
        following = [*range(1, comparisons + 1), 0]
        levels = comparisons + 1
        return cls([0] * comparisons + [LEAF], [0.0] * levels, following, following, [0] * levels)

    def decide(self, observation: np.ndarray) -> int:
        """Return the action for one observation."""
        feature, threshold, left, right, action = self
        node = 0
        while (number := feature[node]) != LEAF:
            node = left[node] if observation.item(number) <= threshold[node] else right[node]
        return action[node]

    @classmethod
    def fitted(cls, found: Any) -> Self:
        """Return the nodes of a ``DecisionTreeClassifier``, without comparisons after which both sides decide alike."""
        tree, action = found.tree_, found.classes_[found.tree_.value[:, 0].argmax(1)].tolist()
        left, right = tree.children_left.tolist(), tree.children_right.tolist()
        for node in reversed(range(len(action))):  # children come after their parent
            if left[node] != LEAF and action[left[node]] == action[right[node]]:
                action[node] = action[left[node]]
            elif left[node] != LEAF:
                action[node] = MIXED
        kept, below = [], [0]
        while below:
            kept.append(node := below.pop())
            if action[node] == MIXED:
                below += (right[node], left[node])
        place = {node: i for i, node in enumerate(kept)}
        return cls(
            [int(tree.feature[node]) if action[node] == MIXED else LEAF for node in kept],
            [float(tree.threshold[node]) if action[node] == MIXED else 0.0 for node in kept],
            [place.get(left[node], 0) for node in kept],
            [place.get(right[node], 0) for node in kept],
            [action[node] for node in kept],
        )

    @classmethod
    def checked(cls, tensors: dict[str, Tensor], numbers: int, actions: int) -> Self:
        """Return the nodes in the tensors of a file.

        Args:
            numbers: length of an observation.
            actions: number of actions.

        Raises:
            ValueError: arrays that are no tree about such observations and actions.
        """
        kinds = {name: tensor.dtype for name, tensor in tensors.items()}
        if kinds != KINDS or len({tensor.shape for tensor in tensors.values()}) != 1 or tensors["feature"].dim() != 1:
            raise ValueError(f"it does not hold the arrays {', '.join(KINDS)} of a tree, all of one length")
        feature, threshold, left, right, action = (tensors[name].numpy() for name in cls._fields)
        count, place, inner = len(feature), np.arange(len(feature)), feature != LEAF
        if not count:
            raise ValueError("its tree has no nodes")
        for name, column, fits, expected in (
            ("feature", feature, (feature >= LEAF) & (feature < numbers), f"{LEAF} to {numbers - 1}"),
            ("threshold", threshold, np.isfinite(threshold), "a finite number"),
            ("left", left, ~inner | ((left > place) & (left < count)), f"a later node, at most {count - 1}"),
            ("right", right, ~inner | ((right > place) & (right < count)), f"a later node, at most {count - 1}"),
            ("action", action, inner | ((action >= 0) & (action < actions)), f"0 to {actions - 1}"),
        ):
            if not fits.all():
                raise ValueError(f"{name} of node {fits.argmin()} is {column[fits.argmin()]}, expected {expected}")
        return cls(*(column.tolist() for column in (feature, threshold, left, right, action)))
