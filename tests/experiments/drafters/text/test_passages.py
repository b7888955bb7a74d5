"""Passages are cut from every form of text, and some of them are for validation alone."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest

from spec_envs.experiments.drafters.text import passages
from spec_envs.experiments.drafters.text.packages import Source
from spec_envs.experiments.drafters.text.passages import Document, Pair, Passages, cut, gathered, is_prose

BEES = "Bees are insects that live together in a hive, gather nectar from many flowers, and make honey of it."
HIVE = "A hive has one queen, who lays all of the eggs, and thousands of workers, who do nearly everything else."
BIENEN = "Bienen sind Insekten, die zusammen in einem Stock leben, Nektar von vielen Blumen sammeln und Honig machen."
STOCK = "Ein Stock hat eine Königin, die alle Eier legt, und Tausende von Arbeiterinnen, die fast alles andere tun."
CODE = "Run the command bees --all in a terminal, then open https://example.org/bees in your browser to see it."
BOTH = (BEES, HIVE)


def of(form: str, files: dict[str, str] | dict[str, bytes]) -> Passages:
    """Return the passages of files of a form."""
    contents = [(name, text.encode() if isinstance(text, str) else text) for name, text in files.items()]
    return cut(Source("docs", "", "1", "", "", form, ()), contents)


def page(title: str, *paragraphs: str) -> str:
    """Return a page of Mallard, with a link in the last word of every paragraph."""
    texts = [f"{p[:-8]}<link>{p[-8:]}</link>".replace(". ", ".\n   ") for p in paragraphs]
    return (
        f'<page xmlns="http://projectmallard.org/1.0/"><info><desc>No paragraph.</desc></info><title>{title}</title>'
        f"<section><p>{'</p><note><p>n</p></note><p>'.join(texts)}</p></section></page>"
    )


def catalog(messages: dict[str, str]) -> bytes:
    """Return a message catalog (.mo) of these messages; see "The Format of GNU MO Files" of gettext's manual."""
    texts = [
        text.encode()
        for pair in sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
        for text in pair
    ]
    at, table = 28 + 8 * len(texts), []
    for text in texts:
        table.append(struct.pack("<II", len(text), at))
        at += len(text) + 1
    half = len(texts) // 2
    head = struct.pack("<7I", 0x950412DE, 0, half, 28, 28 + 8 * half, 0, 0)
    return head + b"".join(table[::2] + table[1::2]) + b"".join(text + b"\0" for text in texts)


def test_pages_of_mallard_and_their_translations() -> None:
    found = of(
        "mallard",
        {
            "usr/share/help/C/book/bees.page": page("Of bees", BEES, CODE, HIVE),
            "usr/share/help/de/book/bees.page": page("Von Bienen", BIENEN, CODE, STOCK),
            "usr/share/help/sv/book/bees.page": page("Fewer paragraphs", STOCK),
            "usr/share/help/de/book/other.page": page("Without English", BIENEN),
        },
    )
    assert found.documents == [Document("Of bees", BOTH)]
    assert found.pairs == [Pair("German", BEES, BIENEN), Pair("German", HIVE, STOCK)]


def test_message_catalogs() -> None:
    messages = {BEES: BIENEN, "Bees": "Bienen", HIVE: HIVE, CODE: CODE, f"{BEES} {HIVE}": STOCK}
    long = " ".join([*BOTH, *BOTH])
    found = of(
        "catalog",
        {
            "locale/de/LC_MESSAGES/story.mo": catalog(messages),
            "locale/pt_BR/LC_MESSAGES/story.mo": catalog({BEES: STOCK, long: f"{BIENEN} {STOCK}"}),
            "locale/eo/LC_MESSAGES/story.mo": catalog({f"Not a language that is read. {BEES}": BIENEN}),
        },
    )
    assert set(found.pairs) == {Pair("German", BEES, BIENEN), Pair("Portuguese", BEES, STOCK)}
    assert {document.paragraphs[0] for document in found.documents} == {f"{BEES} {HIVE}", long}
    assert all(len(document.paragraphs) == 1 and not document.title for document in found.documents)


def test_dictionaries() -> None:
    text = f"00-info\n  About this file.\n\nbee\n   <zoology> {{{BEES}}}\n   [honey]\n\n   {HIVE}\n\n   (1999-01-02)\n\nwasp\n   See bee.\n"
    assert of("dictionary", {"a.dict.dz": gzip.compress(text.encode())}).documents == [Document("bee", BOTH)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"x" * 51), "more than 50 bytes; expected at most"),
        (gzip.compress(b"some text")[:-9], "is damaged"),
        (b"some text", "is damaged"),
        (gzip.compress(b"some text")[:12] + b"some text", "is damaged"),
    ],
    ids=["too large", "cut off", "not compressed", "damaged"],  # gzip writes the time into the bytes
)
def test_dictionaries_that_are_damaged_or_large_are_refused(
    data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passages, "LARGEST_TEXT", 50)
    assert passages.unzipped(gzip.compress(b"x" * 50)) == b"x" * 50
    with pytest.raises(ValueError, match=message):
        of("dictionary", {"a.dz": data})


def test_pages_of_html() -> None:
    text = (
        f"<html><head><title>t</title></head><body><p>Before a heading.</p><h1>1.2. Bees<a>¶</a></h1><p>{BEES[:20]}"
        f"<b>{BEES[20:]}</b></p><pre>code</pre><ul><li>item</ul><p>{HIVE}</p><h2>Short</h2><p>Too short.</p></body>"
    )
    assert of("html", {"a.html": text}).documents == [Document("Bees", BOTH)]


@pytest.mark.parametrize("text", [CODE, "Short.", BEES[:-1], BEES.replace("honey", "h0n3y 1234 5678"), f"{BEES} <b>."])
def test_what_is_not_prose(text: str) -> None:
    assert is_prose(BEES) and not is_prose(text)


def test_some_passages_are_for_validation_alone() -> None:
    texts = [f"{number}. {BEES} {HIVE}" for number in range(240)]
    everything = Passages([Document("", (text,)) for text in texts], [Pair("German", text, BIENEN) for text in texts])
    held, rest = everything.part(held=True), everything.part(held=False)
    assert 8 <= len(held.documents) <= 36 and len(held.documents) + len(rest.documents) == 240
    assert not {d.paragraphs for d in held.documents} & {d.paragraphs for d in rest.documents}
    assert {p.english for p in held.pairs} == {d.paragraphs[0] for d in held.documents}
    assert everything.part(held=True) == held


def test_passages_of_all_packages_come_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "sources", lambda: [Source(name, "", "1", "", "", "html", ()) for name in "ab"])
    monkeypatch.setattr(passages, "obtained", lambda source: Path(source.name))
    page = f"<h1>Bees</h1><p>{BEES}</p><p>{HIVE}</p>"
    files = {"a": {"x": page, "y": page}, "b": {"x": page, "z": page.replace("Bees</h1>", "Wasps</h1>")}}
    monkeypatch.setattr(
        passages, "members", lambda path, _: ((name, text.encode()) for name, text in files[str(path)].items())
    )
    assert gathered().documents == [Document("Bees", BOTH), Document("Wasps", BOTH)]
