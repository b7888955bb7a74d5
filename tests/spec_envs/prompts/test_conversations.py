"""Logs of conversations: turns stay in order, and rows without a conversation are counted and left out."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import pytest

from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.prompts.conversations import read_log, write_log
from spec_envs.prompts.sets import Prompt, in_turn, load_prompts

GOOD = {
    "id": "a",
    "conversations": [
        {"from": "system", "value": "the a"},
        {"from": "human", "value": "of and"},
        {"from": "gpt", "value": "in to"},
        {"from": "human", "value": "is it"},
    ],
}
BAD = (
    '{"conversations": [{"from": "human", "val',
    '{"conversation": []}',
    '{"conversations": [{"from": "robot", "value": "x"}]}',
    '{"conversations": [{"from": "gpt", "value": "x"}]}',
    '{"conversations": [{"from": "human", "value": ""}]}',
    '{"conversations": [{"from": "human", "value": 3}]}',
    '{"conversations": "human"}',
    "[1, 2]",
    "7",
)


def test_turns_have_their_history(tmp_path: Path) -> None:
    log = tmp_path / "log.json"
    log.write_text(json.dumps([GOOD]))
    turns = read_log(log)
    assert [turn.text for turn in turns] == ["of and", "is it"]
    assert turns[0].history == (("system", "the a"),)
    assert turns[1].history == (("system", "the a"), ("user", "of and"), ("assistant", "in to"))
    [first, second] = load_prompts(str(log), "all")
    assert first == Prompt("log", "of and", turns[0].history, logged=True) and second.history == turns[1].history


@pytest.mark.parametrize("kind", ["lines", "array"])
def test_invalid_rows_are_left_out_and_counted(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "log.jsonl"
    if kind == "lines":
        log.write_text("\n".join([json.dumps(GOOD), *BAD, "", json.dumps(GOOD)]))
        count, total, place = len(BAD), len(BAD) + 2, "line 2"
    else:
        log.write_text(json.dumps([GOOD, *(json.loads(bad) for bad in BAD[1:])]))
        count, total, place = len(BAD) - 1, len(BAD), "row 2"
    assert len(read_log(log)) == (4 if kind == "lines" else 2)
    reason = caplog.text
    assert f"left out {count} of {total} rows that are no conversation ({place}, " in reason


def test_log_without_conversations_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("\n".join(BAD))
    with pytest.raises(ValueError, match="holds no conversation; expected"):
        read_log(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=r"cannot read the conversations .*none\.json: No such file"):
        load_prompts(str(tmp_path / "none.json"))


MESSAGES = {
    "messages": [
        {"role": "system", "content": "the a"},
        {"role": "user", "content": [{"type": "text", "text": "of and"}]},
        {"role": "assistant", "content": "in to"},
        {"role": "user", "content": "is it"},
    ]
}


def test_chat_messages_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, [GOOD, MESSAGES])))
    first, second, third, fourth = read_log(log)
    assert (first, second) == (third, fourth)


@pytest.mark.parametrize("array", [False, True])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            '{"conversations": [{"from": "human", "value": "x"}], "split": "dev"}',
            "its split is 'dev', expected one of train",
        ),
        ('{"conversations": [{"from": "human", "value": "x"}], "split": 3}', "its split is '3'"),
        ('{"conversations": [{"from": "human", "value": "x"}], "score": NaN}', "NaN, Infinity or a key twice"),
        ('{"conversations": [{"from": "human", "value": "x", "value": "y"}]}', "NaN, Infinity or a key twice"),
        (
            json.dumps({"conversations": [{"from": "human", "value": "x"}] * 1_000_000}),
            "1000000 turns, expected at most",
        ),
        ('{"conversations": [{"from": ["human"], "value": "x"}]}', "the role of a turn is"),
        (
            '{"conversations": [{"from": "human", "value": "x"}, {"from": "human", "value": "y"}]}',
            "turns are out of order",
        ),
        ('{"conversations": []}', "no list of turns"),
        ('{"conversations": null}', "no list of turns"),
    ],
)
def test_reason_for_leaving_out_a_row_is_logged(
    row: str, reason: str, array: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, good = tmp_path / "log.json", json.dumps(GOOD)
    log.write_text(f"[{good}, {row}, {good}]" if array else f"{good}\n{row}\n{good}")
    assert len(read_log(log)) == 4
    shown = caplog.text
    assert (
        f"left out 1 of 3 rows that are no conversation ({'row' if array else 'line'} 2): " in shown and reason in shown
    )
    log.write_text(row)
    with pytest.raises(ValueError, match=r"log\.json holds no conversation; expected"):
        read_log(log)


def test_deeply_nested_row_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, good, deep = tmp_path / "log.json", json.dumps(GOOD), "[" * 100_000 + "]" * 100_000
    log.write_text(f"{good}\n{deep}\n")
    assert len(read_log(log)) == 2 and "(line 2): it is nested too deeply" in caplog.text
    log.write_text(f"[{good}, {deep}]")
    with pytest.raises(ValueError, match=r"cannot read the conversations .*log\.json: it is nested too deeply"):
        read_log(log)


def test_lone_surrogates_and_other_encodings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "log.json"
    rows = [GOOD, {"conversations": [{"from": "human", "value": "cut \ud83d"}]}]
    log.write_text(json.dumps(rows))
    assert read_log(log)[-1].text == "cut \ufffd" and len(load_prompts(str(log), "all")) == 3
    latin = json.dumps({"conversations": [{"from": "human", "value": "café"}]}, ensure_ascii=False).encode("latin-1")
    log.write_bytes(json.dumps(GOOD).encode() + b"\r\n" + latin + b"\r\n")
    assert len(read_log(log)) == 2 and "(line 2): it is not UTF-8" in caplog.text
    for encoded in (b"[" + latin + b"]", json.dumps(rows).encode("utf-16"), b""):
        log.write_bytes(encoded)
        with pytest.raises(ValueError, match=r"log\.json"):
            read_log(log)


def test_splits_keep_conversations_whole(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [{"conversations": [{"from": "human", "value": f"the {i}"}, *GOOD["conversations"][2:]]} for i in range(60)]
    log.write_text("\n".join(map(json.dumps, rows)))
    openings = [
        {p.history[0][1] if p.history else p.text for p in load_prompts(str(log), split)}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, openings)) == len(set.union(*openings)) == 60 and all(openings)
    write_log(log, ["the\u2028a\x85", "of"], "train")
    assert [p.text for p in load_prompts(str(log), "train")] == ["the\u2028a\x85", "of"]
    log.write_text("\ufeff" + log.read_text())  # some editors begin a file with it
    assert len(load_prompts(str(log), "train")) == 2
    (tmp_path / "other").mkdir()
    write_log(tmp_path / "other" / "log.jsonl", ["in"], "train")
    both = load_prompts(f"{log},{tmp_path / 'other' / 'log.jsonl'}", "train")
    assert len({p.task for p in both}) == 2


def test_in_turn_alternates_domains() -> None:
    a, b = ([Prompt(name, str(i)) for i in range(n)] for name, n in (("a", 5), ("b", 3)))
    assert [p.task + p.text for p in in_turn([*a, *b], 2)] == ["a0", "a1", "b0", "b1", "a2", "a3", "b2", "a4"]


def test_environment_reads_logs(tiny: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = {"conversations": [{"from": "human", "value": "the " * 3000}]}
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [GOOD, long])))
    env = gym.make("SpecDepth-v0", **tiny, prompts=str(tmp_path / "log.jsonl"), split="all")
    assert "left out 1 of 3 prompts, longer than" in caplog.text
    shown = {**tiny, "prompts": str(tmp_path / "log.jsonl")}
    assert len(encoded_prompts(shown, "all", 9)) == 2
    (tmp_path / "log.jsonl").write_text(json.dumps(long))
    with pytest.raises(ValueError, match="every conversation in the split 'all' is longer than"):
        encoded_prompts(shown, "all", 9)
    env.reset(seed=0, options={"prompt": env.unwrapped.prompts[1]})
    expected = env.unwrapped.prompts.tokenizer("the a . of and . in to . is it .")["input_ids"]
    assert env.unwrapped.decoder.prompt == expected
