"""Every branch of a random decision, enumerated with its probability."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

VOCAB = 5


class Branch:
    """Stand for a uniform number: every comparison is a fork whose probability is recorded."""

    def __init__(self, oracle: Oracle):
        self.oracle, self.scale = oracle, 1.0

    def __mul__(self, scale: float) -> Branch:
        self.scale = float(scale)
        return self

    def __lt__(self, threshold: float) -> bool:
        below = min(1.0, threshold / self.scale) if self.scale else 0.0  # in a branch of probability 0
        return self.oracle.fork([below, 1 - below]) == 0


class Oracle:
    """Walk the tree of all forks, depth first; the probability of a walk is the product of its branches'
    probabilities."""

    def __init__(self) -> None:
        self.script: list[int] = []

    def fork(self, probabilities: list[float]) -> int:
        if self.step == len(self.script):
            self.script.append(0)
            self.sizes.append(len(probabilities))
        choice = self.script[self.step]
        self.step += 1
        self.probability *= probabilities[choice]
        return choice

    def walks(self, run: Callable[[], Any]) -> list[tuple[Any, float]]:
        self.sizes: list[int] = []
        outcomes = []
        while True:
            self.step, self.probability = 0, 1.0
            outcome = run()
            outcomes.append((outcome, self.probability))
            while self.script and self.script[-1] + 1 == self.sizes[-1]:
                self.script.pop()
                self.sizes.pop()
            if not self.script:
                return outcomes
            self.script[-1] += 1


def total_variation(a: dict[tuple, float], b: dict[tuple, float]) -> float:
    """Return the total variation distance between two distributions."""
    return 0.5 * sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in {*a, *b})


def chained_exactly(emitted: dict[tuple, float], length: int, p: dict) -> float:
    """Return total variation between target and emitted text, continued by the target to the longest cycle's length."""
    whole: dict[tuple, float] = {}
    for start, probability in emitted.items():
        for rest in itertools.product(range(VOCAB), repeat=length + 1 - len(start)):
            text = (*start, *rest)
            below = np.prod([p[text[:i]][text[i]] for i in range(len(start), length + 1)])
            whole[text] = whole.get(text, 0.0) + probability * below
    exact = {
        text: float(np.prod([p[text[:i]][text[i]] for i in range(length + 1)]))
        for text in itertools.product(range(VOCAB), repeat=length + 1)
    }
    return total_variation(whole, exact)


def random_texts(length: int, seed: int) -> tuple[dict, dict]:
    """Return random distributions of a target and of a draft after every text of up to ``length`` tokens."""
    rng = np.random.default_rng(seed)
    p, q = {}, {}
    for n in range(length + 1):
        for text in itertools.product(range(VOCAB), repeat=n):
            p[text], q[text] = rng.dirichlet(np.ones(VOCAB)), rng.dirichlet(np.ones(VOCAB))
            if seed == 3:  # zeros, as top-p produces them
                for distribution in (p[text], q[text]):
                    distribution[distribution < 0.15] = 0.0
                    distribution /= distribution.sum()
    return p, q
