"""Composed user turns: wordings of many kinds of request (``kinds.yml``), filled with passages, code and words.

The wordings are our own. Passages are those of packages (``passages.py``) and texts that the target wrote earlier.
"""

from __future__ import annotations

import functools
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from spec_envs.experiments.drafters.text.passages import Document, Pair, Passages
from spec_envs.experiments.drafters.turns import library_functions, library_sources

FOLDER = Path(__file__).parent
OWN = 0.35  # share of the passages that the target wrote itself, once there are any
HELD_LANGUAGES = ("Polish", "Swedish")  # for validation alone
NUMBERS = {
    "digit": (2, 9),
    "small": (2, 12),
    "number": (13, 99),
    "big": (110, 2400),
    "percent": (5, 60),
    "day": (1, 28),
    "days": (2, 7),
}


@functools.cache
def table(name: str) -> Any:
    """Return the contents of a YAML file of this folder."""
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


class Composer:
    """Composes user turns.

    Args:
        passages: of the packages.

    Attributes:
        kinds: name of each kind of training text, and its share.
        validation: names of the kinds for validation.
        own: texts that the target wrote, which serve as passages; set by the caller.
    """

    def __init__(self, passages: Passages):
        self.material = Material(passages.part(held=False))
        self.held = Material(passages.part(held=True))
        self.wordings = {kind: row["wordings"] for part in table("kinds.yml").values() for kind, row in part.items()}
        self.kinds = {kind: row["share"] for kind, row in table("kinds.yml")["training"].items()}
        self.validation = list(table("kinds.yml")["validation"])
        self.own: Sequence[str] = ()

    def turn(self, kind: str, rng: random.Random) -> str:
        """Return a user turn of a kind."""
        return self.filled(rng.choice(self.wordings[kind]), rng)

    def follow_up(self, rng: random.Random) -> str:
        """Return a user turn that follows an answer."""
        return self.filled(rng.choice(table("words.yml")["follow"]), rng)

    def filled(self, wording: str, rng: random.Random) -> str:
        """Return a wording with its slots filled."""
        return wording.format_map(Slots(self, rng))


class Slots(dict[str, str]):
    """The values of the slots of one wording, which are drawn as they are asked for."""

    def __init__(self, composer: Composer, rng: random.Random):
        super().__init__()
        self.composer, self.rng = composer, rng

    def __missing__(self, slot: str) -> str:
        name, digit = slot.rstrip(string.digits), slot[len(slot.rstrip(string.digits)) :]
        if name in NUMBERS:
            self[slot] = str(self.rng.randint(*NUMBERS[name]))
        elif name in FILLERS:
            found = FILLERS[name](self.composer, self.rng)
            self.update({key + digit: value for key, value in found.items()})
        else:
            self[slot] = self.composer.filled(str(self.rng.choice(table("words.yml")[name])), self.rng)
        return self[slot]


class Material:
    """Passages, cut to the sizes that the slots need.

    Args:
        passages: of the packages.
    """

    def __init__(self, passages: Passages):
        self.pairs, self.documents = passages.pairs, passages.documents
        self.known = [pair for pair in self.pairs if pair.language not in HELD_LANGUAGES]
        self.unknown = [pair for pair in self.pairs if pair.language in HELD_LANGUAGES]
        self.titled = [document for document in self.documents if document.title and document.words() <= 160]
        self.long = [document for document in self.documents if document.words() >= 220]

    def passage(self, rng: random.Random, least: int = 45, most: int = 180) -> Document:
        """Return consecutive paragraphs of a document with ``least`` to ``most`` words, or a single long one."""
        while True:
            document = rng.choice(self.documents)
            if document.words() >= least:
                return Document(document.title, tuple(window(document.paragraphs, rng, least, most)))


def window(paragraphs: Sequence[str], rng: random.Random, least: int, most: int) -> Iterator[str]:
    """Yield consecutive paragraphs up to ``most`` words in all, or more where fewer than ``least`` would be left."""
    first = rng.randrange(len(paragraphs))
    while first and sum(len(p.split()) for p in paragraphs[first:]) < least:
        first -= 1
    count = 0
    for paragraph in paragraphs[first:]:
        words = paragraph.split()
        if count >= least and count + len(words) > most:
            return
        count += len(words)
        yield paragraph


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, roughly."""
    parts = text.replace("\n", " ").replace("! ", "!\0").replace("? ", "?\0").replace(". ", ".\0").split("\0")
    return [part.strip() for part in parts if len(part.split()) >= 5]


def passage(composer: Composer, rng: random.Random) -> Mapping[str, str]:
    """Fill ``passage`` and a question ``about`` it."""
    if composer.own and rng.random() < OWN:
        document = Document("", (rng.choice(composer.own),))
    else:
        document = composer.material.passage(rng)
    text = "\n\n".join(document.paragraphs)
    words = [word.strip('.,;:!?()"“”’') for word in text.split()]
    subject = document.title or rng.choice([word for word in words if len(word) > 7] or words)
    ask = rng.choice(QUESTIONS).format(subject)
    return {"passage": text, "about": ask}


QUESTIONS = (
    'What is said about "{}"?',
    'What does the text say about "{}"?',
    'Why is "{}" mentioned?',
    'Who or what has to do with "{}", and how?',
    "What is the text about?",
    'Does the text explain "{}"? If so, how?',
    "What happens, and why?",
)


def pair(pairs: Sequence[Pair], rng: random.Random) -> dict[str, str]:
    """Fill ``language``, ``english`` and ``foreign``."""
    found = rng.choice(pairs)
    return {"language": found.language, "english": found.english, "foreign": found.foreign}


def short(composer: Composer, rng: random.Random) -> str:
    """Return one to four sentences."""
    found = sentences(passage(composer, rng)["passage"])
    first, count = rng.randrange(max(1, len(found) - 1)), rng.randint(1, 4)
    return " ".join(found[first : first + count]) or short(composer, rng)


def sentence(composer: Composer, rng: random.Random) -> str:
    """Return a sentence."""
    return rng.choice(sentences(short(composer, rng)) or [short(composer, rng)])


def misspelt(composer: Composer, rng: random.Random) -> str:
    """Return one to four sentences in which some letters are wrong or missing."""
    words = short(composer, rng).split()
    for i, word in enumerate(words):
        at, chance = rng.randrange(len(word)), rng.random()
        if chance < 0.07:
            words[i] = word[:at] + word[at + 1 :]  # a letter is missing
        elif chance < 0.12:
            words[i] = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]  # two letters have changed places
        elif chance < 0.17:
            words[i] = word[:at] + word[at] + word[at:]
        elif chance < 0.25:
            words[i] = word.lower()
        elif chance < 0.28:
            words[i] = word.rstrip(",.")
    return " ".join(filter(None, words))


def article(composer: Composer, rng: random.Random) -> str:
    """Return a text of about 200 to 450 words."""
    if composer.own and rng.random() < OWN:
        return "\n\n".join(rng.sample(composer.own, min(3, len(composer.own))))
    document = rng.choice(composer.material.long)
    return "\n\n".join(window(document.paragraphs, rng, 200, 400))


def numbered(composer: Composer, rng: random.Random) -> Mapping[str, str]:
    """Fill ``numbered``, two to five passages with numbers, and ``wanted``, what one of them explains."""
    documents = rng.sample(composer.material.titled, rng.randint(2, 5))
    form = rng.choice(("[{}] {}: {}", "Document {} ({})\n{}", "{}. {} - {}", "Passage {}: {}\n{}"))
    texts = [
        form.format(number, document.title, " ".join(window(document.paragraphs, rng, 20, 60)))
        for number, document in enumerate(documents, 1)
    ]
    return {"numbered": "\n\n".join(texts), "wanted": rng.choice(documents).title}


def records(composer: Composer, rng: random.Random) -> list[list[str]]:
    """Return rows of a name, a city, an age and an amount."""
    fields = ("{name} {surname}", "{city}", "{number}", "{price}")
    return [[composer.filled(text, rng) for text in fields] for _ in range(rng.randint(3, 7))]


def lines_of_records(composer: Composer, rng: random.Random) -> str:
    """Return rows of data in one of several forms."""
    form = rng.choice(
        ("{}, {}, {}, {}", "{} from {}, aged {}, paid {} dollars", "{}; {}; {}; {}", "- {} ({}): {} | {}")
    )
    return "\n".join(form.format(*row) for row in records(composer, rng))


def markdown(composer: Composer, rng: random.Random) -> Mapping[str, str]:
    """Fill ``table``, and a ``payer`` and a ``place`` that occur in it."""
    rows = records(composer, rng)
    lines = [["name", "city", "age", "paid"], ["---"] * 4, *rows]
    chosen = rng.choice(rows)
    return {"table": "\n".join(f"| {' | '.join(line)} |" for line in lines), "payer": chosen[0], "place": chosen[1]}


@functools.cache
def short_functions() -> tuple[str, ...]:
    """Return the source of functions of the standard library with 4 to 24 lines."""
    return tuple(source for source in library_sources() if 4 <= source.count("\n") + 1 <= 24 and len(source) < 900)


MISTAKES = (  # what stands in a function, and what is written in its place
    *((":\n", "\n"), ("==", "="), (" < ", " > "), ("return ", ""), (" + ", " - "), (")\n", "\n"), ("self.", "")),
    *((" not ", " "), (" in ", " on "), ("None", "none"), ("else:", "else")),
)


def broken(rng: random.Random) -> str:
    """Return a function with one mistake in it."""
    source = rng.choice(short_functions())
    old, new = rng.choice([change for change in MISTAKES if change[0] in source] or [("def ", "de ")])
    at = rng.choice([i for i in range(len(source)) if source.startswith(old, i)])
    return source[:at] + new + source[at + len(old) :]


def held_passage(composer: Composer, rng: random.Random) -> str:
    """Return a passage that training does not have."""
    return "\n\n".join(composer.held.passage(rng, 45, 110).paragraphs)


def price(rng: random.Random) -> str:
    """Return an amount of money."""
    return f"{rng.randint(1, 90)}.{rng.choice((0, 25, 50, 90, 99)):02}"


Filler = Callable[[Composer, random.Random], Mapping[str, str]]
FILLERS: dict[str, Filler] = {
    "passage": passage,
    "about": passage,
    "numbered": numbered,
    "wanted": numbered,
    **dict.fromkeys(("table", "payer", "place"), markdown),
    **dict.fromkeys(("language", "english", "foreign"), lambda c, rng: pair(c.material.known, rng)),
    **dict.fromkeys(
        ("held_language", "held_english"),
        lambda c, rng: {f"held_{key}": value for key, value in pair(c.held.unknown, rng).items()},
    ),
    "held_passage": lambda c, rng: {"held_passage": held_passage(c, rng)},
    "short": lambda c, rng: {"short": short(c, rng)},
    "sentence": lambda c, rng: {"sentence": sentence(c, rng)},
    "misspelt": lambda c, rng: {"misspelt": misspelt(c, rng)},
    "article": lambda c, rng: {"article": article(c, rng)},
    "records": lambda c, rng: {"records": lines_of_records(c, rng)},
    "headword": lambda c, rng: {"headword": rng.choice(c.material.titled).title},
    "code": lambda c, rng: {"code": rng.choice(short_functions())},
    "head": lambda c, rng: {"head": rng.choice(library_functions())},
    "broken": lambda c, rng: {"broken": broken(rng)},
    "price": lambda c, rng: {"price": price(rng)},
    "changes": lambda c, rng: {
        "changes": "\n".join(
            "- " + c.filled(text, rng) for text in rng.sample(table("words.yml")["change"], rng.randint(3, 6))
        )
    },
}
