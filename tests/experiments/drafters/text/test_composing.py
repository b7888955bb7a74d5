"""Composed user turns: every wording can be filled, the same seed gives the same turns, and validation is apart."""

from __future__ import annotations

import ast
import collections
import random
import re
from collections.abc import Iterator

import pytest

from spec_envs.experiments.drafters.text.composing import (
    FILLERS,
    HELD_LANGUAGES,
    NUMBERS,
    Composer,
    Slots,
    broken,
    misspelt,
    sentences,
    short_functions,
    table,
    window,
)
from spec_envs.experiments.drafters.text.passages import LANGUAGES, is_held
from tests.experiments.drafters.text.invented import invented

WORDS, KINDS = table("words.yml"), table("kinds.yml")
SLOT = re.compile(r"(?<!{){(\w+?)(\d*)}")
OWN = ["What the target wrote earlier about the harbour. " * 12, "Another text of the target, on a festival. " * 12]


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer(invented())


def entries() -> Iterator[str]:
    """Yield every wording, and every entry of the lists of words."""
    for part in KINDS.values():
        for kind in part.values():
            yield from kind["wordings"]
    for words in WORDS.values():
        yield from map(str, words)


def test_every_slot_is_known_and_every_list_is_used() -> None:
    known = {*NUMBERS, *FILLERS, *WORDS}
    assert len(known) == len(NUMBERS) + len(FILLERS) + len(WORDS)  # no name stands for two things
    used = {name for entry in entries() for name, _ in SLOT.findall(entry)}
    assert used - known == set()
    read_by_code = {"follow", "change", "name", "surname", "city", "number", "price"}
    assert known - used - read_by_code == set()


@pytest.mark.parametrize("own", [[], OWN])
def test_every_wording_is_filled(composer: Composer, own: list[str]) -> None:
    composer.own = own
    for number, entry in enumerate(entries()):
        for seed in range(3):
            filled = composer.filled(entry, random.Random(f"{number} {seed}"))
            assert filled.strip() and not SLOT.search(re.sub(r"(?s)```.*?```|def .*", "", filled)), entry
    composer.own = []


def test_a_slot_has_one_value_in_a_wording(composer: Composer) -> None:
    for seed in range(20):
        rng = random.Random(seed)
        first, again, other = composer.filled("{name}|{name}|{name2}", rng).split("|")
        assert first == again and {first, other} <= set(WORDS["name"])
        language, english, foreign = composer.filled("{language}|{english}|{foreign}", rng).split("|")
        assert any((p.language, p.english, p.foreign) == (language, english, foreign) for p in composer.material.known)
        text, wanted = composer.filled("{numbered}|{wanted}", rng).rsplit("|", 1)
        assert wanted in text or "|" in text
        rows, payer, place = composer.filled("{table}~{payer}~{place}", rng).split("~")
        assert f"| {payer} | {place} |" in rows
    values = Slots(composer, random.Random(0))
    assert values["number"] == values["number"] and values["foreign2"].startswith(values["language2"])


def turns(composer: Composer, seed: int, count: int) -> list[tuple[str, str]]:
    """Return turns of all kinds for training, with their kinds."""
    rng = random.Random(seed)
    return [(kind, composer.turn(kind, rng)) for kind in composer.kinds for _ in range(count)]


def test_turns_are_reproducible_and_differ(composer: Composer) -> None:
    again = Composer(invented())
    assert turns(composer, 3, 4) == turns(again, 3, 4) != turns(again, 4, 4)
    assert composer.follow_up(random.Random(1)) == again.follow_up(random.Random(1))
    found = [turn for _, turn in turns(composer, 3, 20)]
    assert len(set(found)) > 0.9 * len(found)


def test_shares_are_those_of_the_table(composer: Composer) -> None:
    assert sum(composer.kinds.values()) > 0 and min(composer.kinds.values()) > 0
    assert not set(composer.kinds) & set(composer.validation) and len(composer.validation) >= 8
    assert composer.kinds == {kind: row["share"] for kind, row in KINDS["training"].items()}


def test_training_has_nothing_of_validation(composer: Composer) -> None:
    """Neither kinds, wordings, languages, passages nor pairs of the validation text occur in the training text."""
    training = [row["wordings"] for row in KINDS["training"].values()]
    validation = [row["wordings"] for row in KINDS["validation"].values()]
    assert not set().union(*training) & set().union(*validation)
    assert not any("{held_" in wording for wordings in training for wording in wordings)
    held = {p.english for p in composer.held.pairs} | {p for d in composer.held.documents for p in d.paragraphs[:1]}
    assert held and all(is_held(text) for text in held)
    found = [turn for _, turn in turns(composer, 0, 60)]
    text = "\n".join(found)
    assert not any(language in text for language in HELD_LANGUAGES)
    assert not [passage for passage in held if passage in text]
    rng = random.Random(0)
    checked = [composer.turn(kind, rng) for kind in composer.validation for _ in range(60)]
    seen = {p.english for p in composer.material.pairs} | {d.paragraphs[0] for d in composer.material.documents}
    assert not [passage for passage in seen if passage in "\n".join(checked)]
    named = collections.Counter(language for turn in checked for language in LANGUAGES.values() if language in turn)
    assert set(named) == set(HELD_LANGUAGES)
    assert any(passage in turn for passage in held for turn in checked)


def test_own_texts_are_some_of_the_passages(composer: Composer) -> None:
    composer.own = OWN
    rng = random.Random(0)
    found = [composer.filled("{passage}", rng) for _ in range(200)]
    composer.own = []
    assert 40 <= sum(text in OWN for text in found) <= 100


def test_windows_are_consecutive_paragraphs_of_the_asked_size() -> None:
    rng = random.Random(0)
    paragraphs = ["word " * n + str(i) for i, n in enumerate((9, 19, 29, 9, 19, 29, 9, 19, 29, 9))]
    for _ in range(50):
        found = list(window(paragraphs, rng, 45, 70))
        first = paragraphs.index(found[0])
        assert found == paragraphs[first : first + len(found)]
        assert 45 <= sum(len(p.split()) for p in found) <= 75
    assert list(window(["a b c"], rng, 45, 70)) == ["a b c"]


def test_sentences() -> None:
    assert sentences("One two three four five.\nShort one. Is this one long enough, too? Yes") == [
        "One two three four five.",
        "Is this one long enough, too?",
    ]


def test_misspelt_texts_are_nearly_the_text(composer: Composer) -> None:
    changed = 0
    for seed in range(30):
        text = misspelt(composer, random.Random(seed))
        clean = [word for word in text.split() if word.strip(".").lower() in "the a of"]
        changed += len(text.split()) - len(clean)
        assert len(clean) >= 0.2 * len(text.split())
    assert changed


def test_broken_functions_differ_from_the_library_in_one_place() -> None:
    sources, refused = set(short_functions()), 0
    assert len(sources) > 100 and all(4 <= len(source.split("\n")) <= 24 for source in sources)
    for seed in range(40):
        source = broken(random.Random(seed))
        assert source not in sources
        try:
            ast.parse(source)
        except SyntaxError:
            refused += 1
    assert refused
