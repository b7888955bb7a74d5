"""README.md and the pages of the documentation that are generated are what they should be."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.model
def test_generated_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from _scripts import generate

    outdated = [
        place
        for place, text in generate.generated().items()
        if (generate.DOCS / place).read_text(encoding="utf-8") != text
    ]
    assert not outdated, "run `make docs`, and commit what it changes"


def test_readme_is_read_in_a_minute() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) < 10_000


def test_links_of_the_readme_lead_to_files() -> None:
    places = [place for place in re.findall(r"\]\(([^)#]+)", README) if "://" not in place]
    assert places
    assert [place for place in places if not (ROOT / place).exists()] == []
