"""Describe a cycle for a picture: its candidates, and what became of each of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np

from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.tree import ALTERNATIVES, ROOT, Tree
from spec_envs.text import after, printable


class State(Enum):
    """The fate of a candidate."""

    DRAFTED = "drafted"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    LEFT_OUT = "not verified"
    OWN = "the target's own"


class Candidates(NamedTuple):
    """A copy of the nodes of a tree, as in ``Tree``."""

    tokens: np.ndarray
    parents: np.ndarray
    levels: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, tree: Tree) -> Candidates:
        return cls(tree.tokens.copy(), tree.parents.copy(), tree.levels.copy(), tree.scores.copy())

    def with_alternatives(self, tree: Tree, cycle: Cycle) -> Candidates:
        """Return the tokens of a chain, and after them the alternatives that a cycle verified beside them."""
        further = tree.beside(len(self.tokens), ALTERNATIVES, 0.0)
        nodes = set(zip(cycle.nodes.tokens.tolist(), cycle.nodes.levels.tolist(), strict=True))
        kept = [edge in nodes for edge in zip(further[0].tolist(), further[2].tolist(), strict=True)]
        return Candidates(*(np.concatenate([own, more[kept]]) for own, more in zip(self, further, strict=True)))


class KeptTree(Tree):
    """A tree that keeps a copy of its nodes when it is cleared, so that a picture can show those that were not
    verified.

    Attributes:
        last: the nodes of the last tree that had any.
    """

    def __init__(self, width: int, max_depth: int):
        self.size = 0
        super().__init__(width, max_depth)
        self.last = Candidates.of(self)

    def clear(self) -> None:
        if self.size:
            self.last = Candidates.of(self)
        super().clear()


def keep_trees(engine: Engine) -> None:
    """Have an engine keep what a picture shows of its last cycle."""
    engine.tree = KeptTree(engine.tree.width, engine.max_depth)


@dataclass(frozen=True)
class View:
    """The candidates of a cycle for a picture.

    Attributes:
        tokens, parents, levels, scores: of the candidates, as in ``Tree``.
        states: of the candidates.
        path: ids of the accepted candidates.
        own: token that the target added after them, or None.
    """

    tokens: np.ndarray
    parents: np.ndarray
    levels: np.ndarray
    scores: np.ndarray
    states: list[State]
    path: list[int]
    own: int | None

    @property
    def is_chain(self) -> bool:
        """True for candidates of which every level has one; False without any."""
        return 0 < len(self.levels) == len(np.unique(self.levels))

    @property
    def chances(self) -> np.ndarray:
        """The probability ``[n]`` that the drafter gave each candidate after those before it."""
        above = np.concatenate([self.scores, [0.0]])[self.parents]  # the last entry is ROOT's
        chances: np.ndarray = np.exp(np.minimum(self.scores - above, 0.0))
        return chances

    @property
    def path_chances(self) -> np.ndarray:
        """The probability ``[n]`` that the drafter gave each candidate together with those before it."""
        chances: np.ndarray = np.exp(np.minimum(self.scores, 0.0))
        return chances


def under_way(engine: Engine) -> View:
    """Return the candidates of the cycle under way."""
    nodes = Candidates.of(engine.tree)
    return View(*nodes, [State.DRAFTED] * len(nodes.tokens), [], None)


def ended(engine: Engine, cycle: Cycle) -> View:
    """Return the candidates of the engine's last cycle; none if it drafted none or does not report them."""
    own = cycle.tokens[-1] if cycle.emitted > cycle.accepted and not cycle.unverified else None
    nodes = engine.tree.last if isinstance(engine.tree, KeptTree) else Candidates.of(engine.tree)
    if len(nodes.tokens) != cycle.drafted:
        return View(*(np.zeros(0, np.int64),) * 3, np.zeros(0), [], [], own)
    if cycle.verified > cycle.drafted:
        nodes = nodes.with_alternatives(engine.tree, cycle)
    ids = verified_ids(nodes, cycle)
    states = [State.DRAFTED if cycle.unverified else State.LEFT_OUT] * len(nodes.tokens)
    for node in ids:
        states[node] = State.REJECTED
    path = [ids[node] for node in cycle.nodes.path]
    for node in path:
        states[node] = State.ACCEPTED
    return View(*nodes, states, path, own)


def verified_ids(nodes: Candidates, cycle: Cycle) -> list[int]:
    """Return which of the candidates a cycle verified, in the order of ``cycle.nodes``."""
    ids: list[int] = []
    for token, parent in zip(cycle.nodes.tokens, cycle.nodes.parents, strict=True):
        above = ROOT if parent == ROOT else ids[parent]
        ids.append(int(np.flatnonzero((nodes.parents == above) & (nodes.tokens == token))[0]))
    return ids


def label(engine: Engine, token: int) -> str:
    """Return the text of a token in one line, with marks for a space before it and for line breaks; its id if it
    shows nothing."""
    if token in engine.eos:
        return "‹end›"
    text = printable(after(engine.detokenize, engine.tokens[0], token))
    marked = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "→")
    return marked if marked.strip() else f"#{token}"
