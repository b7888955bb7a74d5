"""Parts of pictures: lines of text, captions, colours and places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spec_envs.decoding.cycle import NO_NODES, Cycle
from spec_envs.rendering import words
from spec_envs.rendering.canvas import cut, drawable, tinted
from spec_envs.rendering.chains import Rows
from spec_envs.rendering.picture import COLUMNS, Ink, wrapped
from spec_envs.rendering.pills import percent
from spec_envs.rendering.trees import OWN, ROWS, Layout
from spec_envs.rendering.view import State, View


def cycle(emitted: int, **counts: Any) -> Cycle:
    zeros = dict.fromkeys(("accepted", "drafted", "verified", "depth"), 0)
    seconds = {"draft": 0.1, "verify": 0.2, "network": 0.05, "policy": 0.0}
    return Cycle([1] * emitted, seconds=seconds, nodes=NO_NODES, **(zeros | counts))


@pytest.mark.parametrize(
    ("done", "width", "expected"),
    [
        (
            cycle(3, accepted=2, drafted=310, verified=7, depth=3),
            10,
            "drafted 4 levels · verified 7 of 310 candidates · accepted 2 · emitted 3 tokens",
        ),
        (cycle(1, drafted=1, verified=1), 1, "drafted 1 token · verified 1 · accepted 0 · emitted 1 token"),
        (cycle(1), 1, "nothing drafted · the target alone emitted 1 token"),
        (cycle(16), 1, "nothing drafted · the target alone emitted 16 tokens"),
        (cycle(4, drafted=4, unverified=4), 1, "drafted and emitted 4 tokens without verification"),
    ],
)
def test_caption_of_a_cycle(done: Cycle, width: int, expected: str) -> None:
    assert words.happened(done, width) == expected


def test_totals_count_forwards_of_the_target() -> None:
    text = [
        cycle(3, accepted=2, drafted=7, verified=7),
        cycle(2, accepted=2, drafted=7, verified=7),  # cut at the end of a text
        cycle(16),  # the cloud alone
        cycle(4, drafted=4, unverified=4),
        cycle(64, accepted=48, drafted=60, verified=60),  # a server's segment
    ]
    assert list(map(words.target_forwards, text)) == [1, 1, 16, 0, 16]
    assert words.totals(text[:1], 5.0) == (
        "3 tokens · 1 target forward · 3.00 tokens per forward · 1.71× the speed of plain decoding"
    )
    assert "prompt" in words.totals([], 5.0)
    assert words.sent(cycle(1, bytes_up=1234, bytes_down=7)) == "1.2 kB up · 7 B down · 50 ms on the network"
    assert words.sent(cycle(1)) == ""
    asked = [cycle(1, drafted=4), cycle(1, drafted=4, drafter="lookup"), cycle(1, drafter="lookup")]
    assert list(map(words.by, asked)) == ["", "drafted by lookup", ""]


def test_text_is_broken_at_spaces() -> None:
    ink = Ink("#000000", False)
    text = "word " * 40 + "x" * 2 * COLUMNS + "\nnext\tcolumn"
    lines = ["".join(letter.text for letter in line) for line in wrapped([(text[:33], ink), (text[33:], ink)])]
    assert all(len(line) <= COLUMNS for line in lines)
    assert lines[0].endswith("word ") and lines[-1] == "next    column"
    assert "".join(lines) == text.replace("\n", "").replace("\t", "    ")
    assert wrapped([]) == [[]]


def test_characters_without_a_glyph_are_boxes() -> None:
    assert drawable("a✓␣語") == "a✓␣□"
    assert cut("abcdef", 4) == "abc…" and cut("abc", 4) == "abc"
    assert tinted("#0072b2", 0) == "#ffffff" and tinted("#0072b2", 1) == "#0072b2"
    assert [percent(chance) for chance in (1.0, 0.5, 0.001)] == ["", "50%", "<1%"]


def test_layout_shows_the_accepted_path_and_parents_of_all(rng: np.random.Generator) -> None:
    parents = np.concatenate([np.full(10, -1), np.repeat(np.arange(10), 10)])
    levels = np.repeat([0, 1], [10, 100])
    scores = np.sort(-rng.random(110))[::-1]
    path = [9, 100 + 3]  # the least probable node, and one of its children
    view = View(np.arange(110), parents, levels, scores, [State.LEFT_OUT] * 110, path, 5)
    layout = Layout.of(view)
    assert [len(column) for column in layout.columns] == [ROWS, ROWS, 1]
    assert layout.hidden == [2, 92, 0] and layout.columns[2] == [OWN]
    assert path[0] in layout.columns[0] and path[1] in layout.columns[1]
    assert all(parents[node] in layout.columns[0] for node in layout.columns[1])


def test_chains_fit_their_rows() -> None:
    for longest in (1, 4, 16, 64, 4096):
        rows = Rows.of(longest)
        assert 6 <= rows.places <= 8 and rows.lines <= 3
        assert rows.places * rows.lines >= min(longest + 2, 24)
        last = rows.place(rows.places * rows.lines - 1)
        assert last.x + last.width <= 785 and 140 < rows.place(0).y <= last.y < 390
