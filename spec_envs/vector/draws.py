"""Random numbers for many environments at once, from a generator of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gymnasium.utils import seeding

WORDS = 128  # words of 32 bits that are fetched from a generator at a time
MASK = np.uint64(0xFFFFFFFF)


class Draws:
    """The generators of ``count`` environments. The numbers are those that ``Generator.integers`` of each would return.

    NumPy makes a number below n from a 32-bit word: it is the high half of word · n (Lemire 2019, arXiv 1805.10941).
    Fetching words and multiplying them here draws for thousands of environments in the time of a few calls.
    """

    def __init__(self, count: int):
        self.generators: dict[int, np.random.Generator] = {}
        self.words, self.at = np.zeros((count, WORDS), np.uint32), np.full(count, WORDS)

    def seed(self, seeds: Sequence[int | None], which: np.ndarray) -> None:
        """Seed the generators of some environments. A generator whose seed is None is kept, or made if there is none.

        Raises:
            gymnasium.error.Error: a seed that is negative or not a whole number. No generator has changed then.
        """
        made = {i: seeding.np_random(seeds[i])[0] for i in which if seeds[i] is not None or i not in self.generators}
        for i, generator in made.items():
            self.generators[i], self.at[i] = generator, WORDS

    def integers(self, which: np.ndarray, below: int) -> np.ndarray:
        """Return a number from 0 to ``below`` - 1 for each of these environments, none of which is listed twice."""
        out = np.zeros(len(which), np.int64)
        left = np.arange(len(which) if below > 1 else 0)  # nothing is drawn where there is one number
        while len(left):
            product = self._next(which[left]).astype(np.uint64) * np.uint64(below)
            out[left] = product >> np.uint64(32)
            left = left[(product & MASK) < (2**32 - below) % below]
        return out

    def _next(self, which: np.ndarray) -> np.ndarray:
        """Return the next word of each of these environments."""
        for i in which[self.at[which] == WORDS]:
            # 64 bits each, of which NumPy takes the low half first
            raw = self.generators[i].bit_generator.random_raw(WORDS // 2)
            self.words[i], self.at[i] = raw.astype("<u8").view("<u4"), 0
        at = self.at[which]
        self.at[which] += 1
        words: np.ndarray = self.words[which, at]
        return words
