"""The target's own text: what is asked in a round, where answers end, and that a killed run continues with its text."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer
from spec_envs.experiments.drafters import selftext
from spec_envs.experiments.drafters.selftext import (
    FOLLOWING,
    FOLLOWING_SHARE,
    GROUPS,
    OWN,
    OWN_SHARE,
    ROWS,
    SHIPPED,
    SPAN,
    TIMES,
    Conversation,
    Request,
    Writer,
    planned,
    read_conversations,
    repeats,
    write_conversations,
    write_validation,
)
from spec_envs.experiments.drafters.text.composing import Composer
from spec_envs.prompts.sets import Prompt
from tests.experiments.drafters.text.invented import invented
from tests.support.models.tiny import CPU

TOKENS, LONGEST, ANSWER = 1200, 300, 40
FINISHED = [Conversation("a user turn", [2, 3, 4, 0], kind="summary")]


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> Transformer:
    return load_target(str(tiny_target), CPU, "float32")


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> PreTrainedTokenizerBase:
    """Return the tiny target's tokenizer with a chat template in which a user turn begins with a word of its own."""
    tokenizer = copy.deepcopy(load_tokenizer(str(tiny_target)))  # that one is every test's
    tokenizer.chat_template = "{% for m in messages %}you {{ m['content'] }} . {% endfor %}"
    return tokenizer


@pytest.fixture
def composer(monkeypatch: pytest.MonkeyPatch) -> Composer:
    """Return a composer for little text: small batches, short turns and answers, and few shipped prompts."""
    monkeypatch.setattr(selftext, "Writer", functools.partial(Writer, max_turn=ANSWER, max_answer=ANSWER))
    monkeypatch.setattr(selftext, "SMALLEST", 4)
    monkeypatch.setattr(selftext, "SHARE", TOKENS)
    shipped = [Prompt("chat", "the first of them"), Prompt("chat", "the second of them")]
    monkeypatch.setattr(selftext, "shipped_prompts", lambda: shipped)
    return Composer(invented(60))


@pytest.fixture
def uninterrupted(target: Transformer, tokenizer: PreTrainedTokenizerBase, composer: Composer, tmp_path: Path) -> bytes:
    """Return the text of a run that is not interrupted."""
    write_conversations(target, tokenizer, path := tmp_path / "whole.jsonl", TOKENS, composer, LONGEST, seed=5)
    return path.read_bytes()


def test_killed_runs_continue_with_the_same_text(
    uninterrupted: bytes, target: Transformer, tokenizer: PreTrainedTokenizerBase, composer: Composer, tmp_path: Path
) -> None:
    """A file that ends anywhere, as after a kill, becomes the file of a run that was not interrupted, whether it ends
    in a line, in a batch, between rounds or in the batch with which the limit of tokens is reached."""
    lines = uninterrupted.splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    rounds, left = ([row.get(key, 0) for row in rows] for key in ("round", "left"))
    counts = itertools.accumulate(len(row["answer_ids"]) for row in rows)
    reached = [count >= TOKENS for count in counts].index(True)  # the conversation with which the limit is reached
    assert rounds[-1] >= 2 and left[-1] == 0 and sum(n == 0 for n in left) > 4
    assert left[reached] > 0
    first_of_round = rounds.index(1)
    for lines_kept, more in (
        (0, 0),
        (3, 20),
        (first_of_round, 0),
        (first_of_round + 2, 5),
        (reached + 1, 0),
        (reached, 30),
    ):
        path = tmp_path / f"{lines_kept}-{more}.jsonl"
        path.write_bytes(uninterrupted[: len(b"".join(lines[:lines_kept])) + more])
        write_conversations(target, tokenizer, path, TOKENS, composer, LONGEST, seed=5)
        assert path.read_bytes() == uninterrupted, (lines_kept, more)
    for row in rows:
        row.pop("left", None)  # as files had none
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[: first_of_round + 1]))
    write_conversations(target, tokenizer, path, TOKENS, composer, LONGEST, seed=5)
    assert [{**json.loads(line), "left": 0} for line in path.open()] == [{**row, "left": 0} for row in rows]


def test_finished_text_is_not_written_again(
    uninterrupted: bytes,
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    composer: Composer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selftext, "generate_batch", None)  # nothing is generated
    write_conversations(target, tokenizer, tmp_path / "whole.jsonl", TOKENS, composer, LONGEST, seed=5)
    assert (tmp_path / "whole.jsonl").read_bytes() == uninterrupted


def test_text_is_what_was_asked_for(uninterrupted: bytes, tmp_path: Path) -> None:
    found = read_conversations(tmp_path / "whole.jsonl")
    sizes = [len(c.answer_ids) for c in found]
    batches = [i for i, c in enumerate(found) if c.left == 0]
    assert sum(sizes) >= TOKENS > sum(sizes[: batches[-2] + 1])  # the last batch reaches the limit
    assert len({c.request for c in found}) == len(found)
    assert {OWN, SHIPPED} <= {c.kind for c in found} and len({c.kind for c in found}) > 10
    for conversation in found:
        ids = conversation.answer_ids
        assert ids[-1] == 0 or len(ids) == ANSWER or repeats(ids)
        assert 0 not in ids[:-1] and not any(repeats(ids[:n]) for n in range(len(ids)))
    assert any(repeats(c.answer_ids) for c in found)  # a random model under greedy decoding loops


def test_validation_text_continues_too(
    target: Transformer, tokenizer: PreTrainedTokenizerBase, composer: Composer, tmp_path: Path
) -> None:
    path = tmp_path / "validation.jsonl"
    for _ in range(2):
        write_validation(target, tokenizer, path, composer, each=2, longest=LONGEST)
        whole = path.read_bytes()
        counts = collections.Counter(c.kind for c in read_conversations(path))
        assert set(counts) == set(composer.validation) and set(counts.values()) <= {1, 2}  # two turns may be the same
        path.write_bytes(whole[:700])
    write_validation(target, tokenizer, path, composer, each=2, longest=LONGEST)
    assert path.read_bytes() == whole


def test_kinds_of_a_round_are_as_asked(
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    composer: Composer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def completed(*arguments: Any) -> list[str]:
        """Return user turns as the target writes them, of which a third is not completed."""
        return [f"{opening} {i}" if i % 3 else "" for i, opening in enumerate(arguments[3])]

    monkeypatch.setattr(selftext, "completed", completed)
    writer = Writer(target, tokenizer, tmp_path / "text.jsonl")
    size = GROUPS * writer.batch
    before = [Conversation(f"turn {i}", [2, 3, 4, 0] if i % 2 else [2, 3], kind="summary") for i in range(size)]
    requests = planned(writer, composer, before, 1, random.Random(0))
    counts = collections.Counter(request.kind for request in requests)
    assert counts[OWN] == round(OWN_SHARE * size)
    assert 0.8 * FOLLOWING_SHARE * size < counts[FOLLOWING] <= round(FOLLOWING_SHARE * size)
    composed, shares = size - round(OWN_SHARE * size) - round(FOLLOWING_SHARE * size), sum(composer.kinds.values())
    assert sum(counts[kind] for kind in composer.kinds) == composed
    for kind, share in composer.kinds.items():
        expected = composed * share / shares
        assert abs(counts[kind] - expected) < 4 * expected**0.5, kind
    assert SHIPPED not in counts
    for request in requests:
        roles = [role for role, _ in request.history]
        assert roles == (["user", "assistant"] if request.kind == FOLLOWING else [])


def test_only_finished_answers_are_continued(
    target: Transformer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    writer = Writer(target, tokenizer, tmp_path / "text.jsonl")
    cut, long = Conversation("cut", [2, 3, 4]), Conversation("long " * 300, [2, 3, 0])
    (history,) = selftext.earlier(writer, [cut, long, *FINISHED])
    assert history == (("user", "a user turn"), ("assistant", tokenizer.decode([2, 3, 4])))


def test_histories_that_fill_the_context_are_left_out(
    target: Transformer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    writer = Writer(target, tokenizer, tmp_path / "text.jsonl", max_turn=target.shape.context - 12)
    short, long = ((("user", "the " * n), ("assistant", "it is")) for n in (2, 20))
    found = selftext.continued(writer, [short, long, short], random.Random(0))
    assert {request.history for request in found} == {short}
    assert selftext.continued(writer, [long], random.Random(0)) == []


def test_batches_fit_the_room_of_a_cache(
    target: Transformer, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """128 prompts of 700 tokens are several batches; short prompts make whole ones, and one too long is alone."""
    writer = Writer(target, tokenizer, tmp_path / "text.jsonl")
    rng = random.Random(0)
    lengths = [700] * 128 + [rng.randint(1, 750) for _ in range(300)] + [ROWS]
    prompts = [([2] * length, Request("", str(i))) for i, length in enumerate(lengths)]
    rng.shuffle(prompts)
    groups = writer.groups(prompts)
    sizes = [(len(group), max(len(ids) for ids, _ in group) + writer.max_answer) for group in groups]
    assert sum(count for count, _ in sizes) == len(prompts) and sizes[-1] == (1, ROWS + writer.max_answer)
    assert all(count <= writer.batch and count * rows <= ROWS for count, rows in sizes[:-1])
    assert len(groups) < 10  # and no batch is smaller than it must be
    flat = [len(ids) for group in groups for ids, _ in group]
    assert flat == sorted(flat)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (list(range(SPAN)) * TIMES, True),
        (list(range(SPAN)) * (TIMES - 1) + list(range(50)), False),
        ([1] * SPAN * TIMES, True),
        ([9, *range(1000, 1000 + SPAN)] * TIMES, True),  # the span, with something else between
        (list(range(SPAN - 1)) * TIMES, False),  # too short yet
        (list(range(200)), False),
        ([], False),
        ([0x1F600, 70000, 0xD800] * 20, True),  # ids of a large vocabulary
    ],
)
def test_loops_are_noticed(answer: list[int], expected: bool) -> None:
    assert repeats(answer) == expected


def test_turns_that_are_all_too_long_are_refused(
    target: Transformer, tokenizer: PreTrainedTokenizerBase, composer: Composer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"longest is 40; expected more than an answer's 40 tokens"):
        write_conversations(target, tokenizer, tmp_path / "text.jsonl", TOKENS, composer, longest=ANSWER)
    assert not (tmp_path / "text.jsonl").exists()
    with pytest.raises(ValueError, match=r"no user turn has at most 1 tokens; raise --longest"):
        write_conversations(target, tokenizer, tmp_path / "text.jsonl", TOKENS, composer, longest=ANSWER + 1)
