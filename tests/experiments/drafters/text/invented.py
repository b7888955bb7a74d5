"""Invented passages, as packages provide them."""

from __future__ import annotations

import random

from spec_envs.experiments.drafters.text.passages import LANGUAGES, Document, Pair, Passages

NOUNS = (
    "gardener",
    "window",
    "teacher",
    "mountain",
    "keyboard",
    "letter",
    "harbour",
    "festival",
    "computer",
    "neighbour",
)
VERBS = ("describes", "repairs", "remembers", "carries", "forgets", "discovers")


def sentence(rng: random.Random) -> str:
    """Return a sentence of seven words."""
    first, second, third = rng.sample(NOUNS, 3)
    return f"The {first} {rng.choice(VERBS)} a {second} of the {third}."


def invented(count: int = 240, seed: int = 0) -> Passages:
    """Return ``count`` documents of 35 to 320 words, most of them with a title, and as many pairs of every language."""
    rng = random.Random(seed)
    found = Passages()
    for number in range(count):
        paragraphs = [" ".join(sentence(rng) for _ in range(5)) for _ in range(rng.choice((1, 2, 3, 7, 9)))]
        title = f"{rng.choice(NOUNS)} {number}" if number % 4 else ""
        found.documents.append(Document(title, tuple(paragraphs)))
        found.pairs += [
            Pair(language, f"{sentence(rng)} {number}.", f"{language}: {sentence(rng)}")
            for language in LANGUAGES.values()
        ]
    return found
