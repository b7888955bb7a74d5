"""Passages cut from packages (``packages.py``): documents of clean prose in English, and pairs of parallel texts."""

from __future__ import annotations

import gettext
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import PurePosixPath
from xml.etree import ElementTree

from tqdm import tqdm

from spec_envs.experiments.drafters.text.packages import Source, members, obtained, sources

LANGUAGES = {  # of the parallel texts that are read
    "de": "German",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "pt_BR": "Portuguese",
    "nl": "Dutch",
    "pl": "Polish",
    "sv": "Swedish",
}
SHORTEST, LONGEST = 40, 500  # characters of a parallel text
LARGEST_TEXT = 1 << 26  # bytes of a dictionary
HELD = 12  # one document of so many, and as many pairs, is for validation
MALLARD = "{http://projectmallard.org/1.0/}"
SKIPPED = re.compile(r"https?:|www\.|[<>|\\^~*=_{}$]|\.(?:txt|html|org|com)\b|`")


@dataclass(frozen=True)
class Document:
    """Prose under one heading."""

    title: str
    paragraphs: tuple[str, ...]

    def words(self) -> int:
        """Return the number of words."""
        return sum(len(paragraph.split()) for paragraph in self.paragraphs)


@dataclass(frozen=True)
class Pair:
    """A text in English, and the same one in a language of ``LANGUAGES``."""

    language: str
    english: str
    foreign: str


@dataclass
class Passages:
    """The texts that a package, or many, provide."""

    documents: list[Document] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    def part(self, held: bool) -> Passages:
        """Return those that are for validation, or those that are not."""
        return Passages(
            [d for d in self.documents if is_held(d.paragraphs[0]) == held],
            [p for p in self.pairs if is_held(p.english) == held],
        )


def is_held(text: str) -> bool:
    """Return whether a text is for validation, which its own words decide."""
    return zlib.crc32(text.encode()) % HELD == 0


def gathered() -> Passages:
    """Return the passages of all packages, without repetitions.

    Raises:
        ValueError: a package cannot be obtained or read.
    """
    documents: dict[Document, None] = {}
    pairs: dict[Pair, None] = {}
    for source in tqdm(sources(), desc="reading packages", unit="package", leave=False):
        read = cut(source, members(obtained(source), source.members))
        documents |= dict.fromkeys(read.documents)
        pairs |= dict.fromkeys(read.pairs)
    return Passages(list(documents), list(pairs))


def cut(source: Source, files: Iterable[tuple[str, bytes]]) -> Passages:
    """Return the passages of the files of a package."""
    return FORMS[source.form](dict(sorted(files)))


def is_prose(text: str) -> bool:
    """Return whether a paragraph is whole sentences of ordinary words."""
    letters = sum(c.isalpha() or c in " ,.;:'’-" for c in text)
    return len(text) >= SHORTEST and text[-1] in '.!?”"' and letters > 0.94 * len(text) and not SKIPPED.search(text)


def document(title: str, paragraphs: Iterable[str]) -> Iterator[Document]:
    """Yield the document that the paragraphs of prose make, if they are enough."""
    prose = tuple(p for p in dict.fromkeys(paragraphs) if is_prose(p))
    found = Document(title, prose)
    if found.words() >= 30 and len(title) < 100:
        yield found


def one_line(text: str) -> str:
    """Return a text with single spaces."""
    return " ".join(text.split())


def mallard(files: dict[str, bytes]) -> Passages:
    """Cut pages of ``help/LANGUAGE/BOOK/NAME.page``; those of the language ``C`` are English."""
    passages = Passages()
    for name, data in files.items():
        help_folder, language = PurePosixPath(name).parts[-4:-2]
        if language != "C":
            continue
        title, texts = mallard_page(data)
        passages.documents += document(title, texts)
        for code, spoken in LANGUAGES.items():
            translated = files.get(name.replace(f"{help_folder}/C/", f"{help_folder}/{code}/"))
            if translated is None:
                continue
            _, others = mallard_page(translated)
            if len(others) == len(texts):
                passages.pairs += parallel(spoken, zip(texts, others, strict=True))
    return passages


def mallard_page(data: bytes) -> tuple[str, list[str]]:
    """Return the title and the paragraphs of a page."""
    root = ElementTree.fromstring(data)
    title = one_line("".join(root.find(f"{MALLARD}title").itertext()))  # type: ignore[union-attr]
    return title, [one_line("".join(p.itertext())) for p in root.iter(f"{MALLARD}p")]


def catalog(files: dict[str, bytes]) -> Passages:
    """Cut message catalogs ``LANGUAGE/LC_MESSAGES/NAME.mo``, whose messages are English."""
    passages = Passages()
    stories: dict[str, None] = {}
    for name, data in files.items():
        spoken = LANGUAGES.get(PurePosixPath(name).parts[-3])
        if spoken is None:
            continue
        found = gettext.GNUTranslations(io.BytesIO(data))._catalog  # type: ignore[attr-defined]
        texts = [(one_line(k), one_line(v)) for k, v in found.items() if isinstance(k, str)]
        passages.pairs += parallel(spoken, texts)
        stories |= dict.fromkeys(english for english, _ in texts)
    for story in stories:
        passages.documents += document("", [story])
    return passages


def parallel(language: str, texts: Iterable[tuple[str, str]]) -> Iterator[Pair]:
    """Yield the pairs of English and foreign texts that are prose and of similar length."""
    for english, foreign in texts:
        alike = len(english) <= LONGEST and 0.6 < len(foreign) / max(1, len(english)) < 1.8
        if alike and english != foreign and is_prose(english) and is_prose(foreign):
            yield Pair(language, english, foreign)


def dictionary(files: dict[str, bytes]) -> Passages:
    """Cut dictionaries in dictd's form: a headword at the margin, and an indented text."""
    passages = Passages()
    for data in files.values():
        text = unzipped(data).decode(errors="replace")
        for entry in re.split(r"\n(?=\S)", text):
            head, _, body = entry.partition("\n")
            body = re.sub(r"^ *<[^>]*>|\[[^\]]*\]|\(\d{4}-\d\d-\d\d\)|[{}]", "", body, flags=re.M)
            paragraphs = [one_line(part) for part in re.split(r"\n\s*\n", body)]
            passages.documents += document(head.strip(), paragraphs)
    return passages


def unzipped(data: bytes) -> bytes:
    """Return what a gzip file holds, such as the ``.dz`` file of a dictionary.

    Raises:
        ValueError: it is damaged, or holds more than ``LARGEST_TEXT`` bytes.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            text = file.read(LARGEST_TEXT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"a dictionary is damaged ({error}); delete its package and run the command again") from None
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"a dictionary has more than {LARGEST_TEXT} bytes; expected at most as many")
    return text


def html(files: dict[str, bytes]) -> Passages:
    """Cut pages of HTML."""
    passages = Passages()
    for data in files.values():
        page = Page()
        page.feed(data.decode(errors="replace"))
        for title, paragraphs in page.sections:
            passages.documents += document(title, paragraphs)
    return passages


class Page(HTMLParser):
    """Headings of a page, each with its paragraphs."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[str]]] = [("", [])]
        self.text: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "h1", "h2", "h3", "h4"):
            self.text = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "h1", "h2", "h3", "h4") and self.text is not None:
            text, self.text = one_line("".join(self.text)), None
            if tag == "p":
                self.sections[-1][1].append(text)
            else:
                self.sections.append((re.sub(r"^[\d.\s]+|¶$", "", text), []))

    def handle_data(self, data: str) -> None:
        if self.text is not None:
            self.text.append(data)


FORMS: dict[str, Callable[[dict[str, bytes]], Passages]] = {
    "mallard": mallard,
    "catalog": catalog,
    "dictionary": dictionary,
    "html": html,
}
