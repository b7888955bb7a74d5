"""Files of prompts from other sources give prompts that can be encoded, or one sentence that names the file."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.prompts.questions import column_turns
from spec_envs.prompts.sets import Prompt, encode_all, load_prompts


def question_file(folder: Path, *lines: str | bytes) -> str:
    """Write a prompt set ``q`` of these lines, and return the folder for ``data_dir=``."""
    (folder / "q").mkdir(parents=True, exist_ok=True)
    (folder / "q" / "question.jsonl").write_bytes(
        b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    )
    return str(folder)


def texts(*lines: str | bytes, folder: Path) -> list[str]:
    return [prompt.text for prompt in load_prompts("q", "all", question_file(folder, *lines))]


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ("Write a poem.", ["Write a poem."]),
        (["Write a poem."], ["Write a poem."]),
        ([{"role": "user", "content": "a"}], ["a"]),
        ([{"role": "system", "content": "s"}, {"from": "human", "value": [{"type": "text", "text": "a"}]}], ["a"]),
        (["cut \ud83d", "b"], ["cut \ufffd"]),
        (["\ud83d\ude00"], ["😀"]),
    ],
)
def test_first_turn_is_the_prompt(turns: Any, found: list[str], tmp_path: Path) -> None:
    assert texts(json.dumps({"turns": turns, "category": "writing"}), folder=tmp_path) == found


@pytest.mark.parametrize(
    "row",
    [
        *(
            {"turns": turns}
            for turns in (None, 3, True, 1.5, [], [[]], [["a"]], [None], [3], ["a", None], {}, {"a": 1})
        ),
        *({"turns": turns} for turns in ("", " \n", [""], ["\t", "a"], [{}], [{"role": "user"}], [{"role": "robot"}])),
        {"turns": [{"role": "assistant", "content": "a"}]},
        {"turns": [{"role": ["user"], "content": "a"}]},
        {"turns": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        *({"turns": ["a"], "split": split} for split in ("dev", "", 3, [], {}, True)),
        *([], ["a"], "a", 3, None),
        {},
    ],
)
def test_invalid_rows_are_refused_with_file_and_line(row: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"q/question\.jsonl:2 is not a question; expected .* in UTF-8, but .+"
    ) as raised:
        texts('{"turns": ["fine"]}', json.dumps(row), folder=tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"turns": ["a"], "score": NaN}',
        '{"turns": ["a"], "score": [{"x": -Infinity}]}',
        '{"turns": ["a"], "turns": ["b"]}',
        '{"turns": ["a"], "meta": {"x": 1, "x": 2}}',
        '{"turns": ["a"], "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"turns": ["a"], "n": ' + "1" * 10_000 + "}",
        '{"turns": ["a"',
        '{"turns": ["a\x00"]}',
        '{"turns": ["café"]}'.encode("latin-1"),
        '{"turns": ["a"]}'.encode("utf-16"),
        '{"turns": ["a"]}'.encode("utf-16-le"),
        b"\xff\xfe\x00",
    ],
)
def test_lines_that_are_not_json_in_utf_8_are_refused(line: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q/question\.jsonl:\d+ is not a question"):
        texts(line, folder=tmp_path)


def test_byte_order_marks_line_ends_and_long_lines_are_read(tmp_path: Path) -> None:
    row = json.dumps({"turns": ["café\u2028x"]}, ensure_ascii=False)
    assert texts(row.encode("utf-8-sig") + b"\r\n\r\n" + row.encode() + b"\r", folder=tmp_path) == ["café\u2028x"] * 2
    assert texts(json.dumps({"turns": ["a" * 3_000_000]}), folder=tmp_path) == ["a" * 3_000_000]
    assert texts('{"turns": ["a\\u0000b"]}', folder=tmp_path) == ["a\x00b"]
    assert texts('{"turns": ["a"], "split": null}', folder=tmp_path) == ["a"]


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q/question\.jsonl holds no question; expected"):
        texts("", "  ", folder=tmp_path / "empty")
    (tmp_path / "folder" / "q" / "question.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot read the questions .*q/question\.jsonl: Is a directory"):
        load_prompts("q", "all", str(tmp_path / "folder"))
    with pytest.raises(ValueError, match=r"cannot read the conversations .*: embedded null"):
        load_prompts("a\x00.jsonl", "all")
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"cannot read the conversations .*log\.jsonl: Is a directory"):
        load_prompts(str(tmp_path / "log.jsonl"), "all")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_refused(tmp_path: Path) -> None:
    folder = question_file(tmp_path, '{"turns": ["a"]}')
    (tmp_path / "q" / "question.jsonl").chmod(0)
    with pytest.raises(ValueError, match=r"cannot read the questions .*: Permission denied"):
        load_prompts("q", "all", folder)


def test_left_out_turns_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"turns": ["a", "b", "c"]}, {"turns": ["d"]}, {"turns": ["e", "f"]}]
    assert texts(*map(json.dumps, rows), folder=tmp_path) == ["a", "d", "e"]
    message = caplog.text
    assert "q/question.jsonl: left out 3 later turns of 2 questions" in message and message.count("\n") == 1
    caplog.clear()
    assert texts(*map(json.dumps, rows[1:2]), folder=tmp_path) == ["d"] and not caplog.text


def data_set(folder: Path, *rows: Any) -> str:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("rows", "found", "message"),
    [
        ([{"prompt": [user("a")]}, {"prompt": [user("b")]}], ["a", "b"], ""),
        ([{"messages": [user("a"), {"role": "assistant", "content": "b"}, user("c")]}], ["a", "c"], ""),
        ([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}], ["a"], ""),
        ([{"prompt": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]}], ["a\nb"], ""),
        (
            [{"prompt": None}, {"prompt": "a"}, {"prompt": " "}],
            ["a"],
            "set@1:prompt: left out 2 of 3 rows that hold no ",
        ),
        ([{"turns": ["a", "b"]}, {"turns": []}], ["a"], "set@1:turns: left out 1 later turns of 1 questions"),
    ],
)
def test_prompts_of_data_sets(
    rows: list[Any], found: list[str], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = load_prompts(data_set(tmp_path / "set@1", *rows), "all")
    assert [prompt.text for prompt in prompts] == found and all(prompt.logged for prompt in prompts)
    if "messages" in rows[0]:
        assert prompts[1].history == (("user", "a"), ("assistant", "b"))
    shown = caplog.text
    assert message in shown and ("left out" in shown) == bool(message)


@pytest.mark.parametrize("values", [[3, 4], [None], [[3]], [[]], [[["a"]]], [{"a": "b"}], [""]])
def test_data_sets_without_a_prompt_are_refused(values: list[Any], tmp_path: Path) -> None:
    rows = [{"prompt": value, "other": 1} for value in values]
    with pytest.raises(ValueError, match=r"set:prompt holds no prompt; expected .*; row 1: "):
        load_prompts(data_set(tmp_path / "set", *rows), "all")


def test_unloadable_data_sets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot load the data set '.*empty' from the hub: "):
        load_prompts(str(tmp_path / "empty"), "all")
    with pytest.raises(ValueError, match=r"cannot load the data set '.*bad' from the hub: "):
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad" / "train.jsonl").write_bytes(b"\xff\xfe\x00 nothing")
        load_prompts(str(tmp_path / "bad"), "all")


def test_no_code_of_a_data_set_is_executed(tmp_path: Path) -> None:
    folder, mark = tmp_path / "set", tmp_path / "ran"
    folder.mkdir()
    (folder / "set.py").write_text(
        f"open({str(mark)!r}, 'w')\nimport datasets\nclass Set(datasets.GeneratorBasedBuilder): pass\n"
    )
    with pytest.raises(ValueError, match="cannot load the data set"):
        load_prompts(str(folder), "all")
    assert not mark.exists()


# Any JSON value, with the keys and texts of prompts drawn more often than by chance.
WORDS = st.sampled_from(
    ["turns", "conversations", "messages", "from", "value", "role", "content", "text", "type", "split"]
)
TEXTS = st.sampled_from(
    ["human", "gpt", "user", "assistant", "system", "train", "dev", "", " ", "the a", "\ud83d", "\ud83d\ude00", "\x00"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(), inner, max_size=4),
    max_leaves=12,
)
CHAT = st.lists(
    st.fixed_dictionaries(
        {}, optional={"from": TEXTS, "value": TEXTS | VALUES, "role": TEXTS, "content": TEXTS | VALUES}
    ),
    max_size=4,
)
ROWS = VALUES | st.fixed_dictionaries(
    {},
    optional={
        "turns": st.lists(TEXTS) | CHAT | VALUES,
        "conversations": CHAT,
        "messages": CHAT | VALUES,
        "split": TEXTS | VALUES,
    },
)
LINES = st.lists(ROWS.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=40), max_size=5)


def assert_encoded_or_refused(read: Callable[[], list[Prompt]], tiny: dict, named: str) -> None:
    """Assert that all prompts are encoded, or that one sentence names the place of the error."""
    try:
        prompts = read()
    except ValueError as error:
        assert re.search(named, str(error)) and "\n" not in str(error)
        return
    try:
        encoded = list(encode_all(load_tokenizer(tiny["target"]), prompts))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert all(ids for _, ids in encoded) and encoded


@pytest.mark.fuzz
@given(lines=LINES)
def test_any_question_file_is_read_or_refused(tiny: dict, lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        question_file(Path(folder), *lines)
        assert_encoded_or_refused(lambda: load_prompts("q", "all", folder), tiny, r"q/question\.jsonl")


@pytest.mark.fuzz
@given(lines=LINES, array=st.booleans(), rows=st.lists(ROWS, max_size=5))
def test_any_log_is_read_or_refused(tiny: dict, lines: list[bytes], array: bool, rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.json"
        log.write_bytes(json.dumps(rows).encode() if array else b"\n".join(lines))
        assert_encoded_or_refused(lambda: load_prompts(str(log), "all"), tiny, r"log\.json")


@pytest.mark.fuzz
@given(values=st.lists(VALUES | CHAT | st.lists(TEXTS), max_size=5))
def test_any_column_is_read_or_refused(tiny: dict, values: list[Any]) -> None:
    assert_encoded_or_refused(
        lambda: [Prompt("set", turn.text, turn.history, True) for turn in column_turns(values, "set:c")], tiny, "set:c"
    )
