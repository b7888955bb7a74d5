"""Text that the target writes itself and that its drafter learns from, so that no data set is needed.

User turns are composed (``text/composing.py``), or sampled at temperature 1 from the chat template, after which the model
writes the kind of request that it was tuned on. The target answers them greedily. Each conversation is a line of JSON.

Text is written in rounds: the turns of a round depend on the seed, the number of the round and the conversations of the
rounds before it, so a killed run continues with the very text that it would have written.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from spec_envs.decoding.model.batch import generate_batch
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.experiments.drafters.text.composing import Composer
from spec_envs.experiments.drafters.turns import OPENINGS, shipped_prompts
from spec_envs.files import parse_json, whole
from spec_envs.prompts.sets import decode, encode
from spec_envs.prompts.templates import rendered
from spec_envs.text import Detokenizer, TextStream

SMALLEST, SHARE = 8, 100  # least texts of a batch, and tokens in all for each text of it
ROWS = 1 << 16  # most rows of a batch's cache
GROUPS = 4  # batches of a round, about
MARK = "\x00turn\x00"
OWN, SHIPPED, FOLLOWING = "own", "shipped", "dialogue"  # kinds that are not composed
OWN_SHARE, FOLLOWING_SHARE = 0.2, 0.12  # shares of the turns; those of the composed kinds share the rest
OPENED = 0.4  # share of the sampled user turns that start with one of ``OPENINGS``
COMPLETED = 0.6  # share of the sampled user turns that end in time, about
SPAN, TIMES = 8, 4  # an answer ends when it says so many tokens so many times
LONGEST_HISTORY = 1200  # characters of the turns before a follow-up turn


@dataclass(frozen=True)
class Conversation:
    """A user turn and its answer.

    Attributes:
        answer_ids: token ids of the answer; empty if the answer is given as text.
        assistant: text of the answer; EOS follows it if it is ``complete``.
        kind: of request.
        history: role and text of every turn before the user turn.
        round: number of the round in which it was written.
        left: number of conversations of its batch that were written after it.
    """

    user: str
    answer_ids: list[int]
    assistant: str | None = None
    complete: bool = True
    kind: str = ""
    history: tuple[tuple[str, str], ...] = ()
    round: int = 0
    left: int = 0

    @classmethod
    def of(cls, line: Any) -> Conversation:
        """Return the conversation that a line of JSON holds.

        Raises:
            TypeError, ValueError, KeyError, AttributeError: the line holds no conversation.
        """
        ids, text = line.get("answer_ids"), line.get("assistant")
        history = tuple((role, said) for role, said in line.get("history", ()))
        strings = [line["user"], line.get("kind", ""), *itertools.chain(*history)]
        answered = isinstance(text, str) if ids is None else all(type(token) is int for token in ids)
        if not answered or not all(isinstance(said, str) for said in strings):
            raise TypeError
        answer = (ids or [], text if ids is None else None, line.get("complete", True))
        return cls(line["user"], *answer, line.get("kind", ""), history, line.get("round", 0), line.get("left", 0))

    @property
    def request(self) -> Request:
        """The turn that is answered."""
        return Request(self.kind, self.user, self.history)


@dataclass(frozen=True)
class Request:
    """A user turn to answer; its attributes are those of ``Conversation``."""

    kind: str
    user: str
    history: tuple[tuple[str, str], ...] = ()


def user_prefix(tokenizer: PreTrainedTokenizerBase, history: Sequence[tuple[str, str]] = ()) -> str:
    """Return the text of the chat template before a user turn."""
    return rendered(tokenizer, [*history, ("user", MARK)], answer=False).split(MARK)[0]


@dataclass
class Writer:
    """Lets a target answer requests, and keeps the conversations in a file.

    Attributes:
        batch: most answers in a batch.
        max_turn, max_answer: most tokens; a longer user turn of the target is dropped, a longer answer is cut, as is one
            that repeats itself.
        longest: most tokens of prompt and answer together; longer prompts are dropped.
    """

    target: Transformer
    tokenizer: PreTrainedTokenizerBase
    path: Path
    batch: int = 128
    max_turn: int = 160
    max_answer: int = 224
    longest: int = 1024

    def __post_init__(self) -> None:
        if self.longest <= self.max_answer:
            raise ValueError(f"longest is {self.longest}; expected more than an answer's {self.max_answer} tokens")
        self.written = read_conversations(self.path) if self.path.exists() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path) as temporary:  # without a truncated last line
            temporary.write_text("".join(map(as_line, self.written)))

    def answer(self, requests: Sequence[Request], number: int, rng: random.Random) -> Iterator[int]:
        """Answer the requests of a round that are not answered yet; yield the number of new tokens of each batch."""
        done = {c.request for c in self.written}
        prompts = [(encode(self.tokenizer, r.user, history=r.history), r) for r in dict.fromkeys(requests)]
        groups = self.groups([prompt for prompt in prompts if len(prompt[0]) + self.max_answer <= self.longest])
        rng.shuffle(groups)  # so that an interrupted round lacks texts of every length, not only the longest
        eos = {self.tokenizer.eos_token_id}
        for group in groups:
            open_group = [(ids, request) for ids, request in group if request not in done]
            if not open_group:
                continue
            ids = [ids for ids, _ in open_group]
            answers = generate_batch(self.target, ids, self.max_answer, eos, doing="answering", ends=repeats)
            new = [
                Conversation(r.user, answer, kind=r.kind, history=r.history, round=number, left=left)
                for left, (_, r), answer in zip(reversed(range(len(answers))), open_group, answers, strict=True)
            ]
            self.written += new
            with self.path.open("a") as file:
                file.writelines(map(as_line, new))
            yield sum(map(len, answers))

    def groups(self, prompts: list[tuple[list[int], Request]]) -> list[list[tuple[list[int], Request]]]:
        """Return batches of prompts of similar length whose cache has at most ``ROWS`` rows."""
        groups: list[list[tuple[list[int], Request]]] = []
        for prompt in sorted(prompts, key=lambda pair: len(pair[0])):
            if not groups or len(groups[-1]) >= min(self.batch, ROWS // (len(prompt[0]) + self.max_answer)):
                groups.append([])
            groups[-1].append(prompt)
        return groups

    def texts(self, conversations: Sequence[Conversation]) -> list[str]:
        """Return the answers of conversations that are finished."""
        eos = self.tokenizer.eos_token_id
        return [decode(self.tokenizer, c.answer_ids[:-1]) for c in conversations if c.answer_ids[-1] == eos]


def write_conversations(
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    tokens: int,
    composer: Composer,
    longest: int = 1024,
    seed: int = 0,
) -> None:
    """Append conversations to ``path`` until it holds ``tokens`` answer tokens.

    Args:
        longest: most tokens of turn and answer together; longer turns are dropped.

    Raises:
        ValueError: ``longest`` is too small, or no user turn is short enough.
    """
    writer = Writer(target, tokenizer, path, longest=longest)
    writer.batch = min(writer.batch, max(SMALLEST, tokens // SHARE))  # several batches even for little text
    count = sum(len(c.answer_ids) for c in writer.written)
    number = writer.written[-1].round if writer.written else 0
    unfinished = bool(writer.written) and writer.written[-1].left > 0  # a batch, of which a killed run wrote a part
    with tqdm(total=tokens, initial=min(count, tokens), unit="tok", desc="writing text") as bar:
        while count < tokens or unfinished:
            rng = random.Random(f"{seed}-{number}")
            before = [c for c in writer.written if c.round < number]
            requests = planned(writer, composer, before, number, rng)
            for new in writer.answer(requests, number, rng):
                unfinished = False
                count += new
                bar.update(min(count, tokens) - bar.n)
                if count >= tokens:
                    break
            if not any(c.round == number for c in writer.written):
                raise ValueError(
                    f"--longest is {longest}, of which an answer may take {writer.max_answer}: no user turn has at most "
                    f"{longest - writer.max_answer} tokens; raise --longest"
                )
            number += 1


def planned(
    writer: Writer, composer: Composer, before: Sequence[Conversation], number: int, rng: random.Random
) -> list[Request]:
    """Return the requests of a round.

    Args:
        before: the conversations of the rounds before it.
    """
    size = GROUPS * writer.batch
    recent = [c for c in rng.sample(before, min(4 * size, len(before))) if c.kind != "code"]
    composer.own = [text for text in writer.texts(recent) if len(text.split()) >= 40 and "```" not in text]
    own, following = round(OWN_SHARE * size), round(FOLLOWING_SHARE * size)
    users = sampled_turns(writer.target, writer.tokenizer, round(own / COMPLETED), writer.max_turn, OPENED, rng)
    requests = [Request(OWN, user) for user in users[:own]]
    histories = list(itertools.islice(earlier(writer, recent), following))
    requests += continued(writer, histories[: following // 3], rng)
    requests += [Request(FOLLOWING, composer.follow_up(rng), history) for history in histories[following // 3 :]]
    if number == 0:
        requests += [Request(SHIPPED, prompt.text, prompt.history) for prompt in shipped_prompts()]
    kinds = rng.choices(list(composer.kinds), list(composer.kinds.values()), k=size - own - following)
    return requests + [Request(kind, composer.turn(kind, rng)) for kind in kinds]


def earlier(writer: Writer, conversations: Sequence[Conversation]) -> Iterator[tuple[tuple[str, str], ...]]:
    """Yield the turns of finished conversations that are short enough for another turn."""
    for conversation in conversations:
        for answer in writer.texts([conversation]):
            history = (*conversation.history, ("user", conversation.user), ("assistant", answer))
            if answer.strip() and sum(len(said) for _, said in history) <= LONGEST_HISTORY:
                yield history


def write_validation(
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    composer: Composer,
    each: int = 24,
    longest: int = 1024,
    seed: int = 0,
) -> None:
    """Write ``each`` conversations of every kind for validation, which are kinds that training does not have.

    Args:
        longest: most tokens of turn and answer together; longer turns are dropped.

    Raises:
        ValueError: ``longest`` is too small.
    """
    writer, rng = Writer(target, tokenizer, path, longest=longest), random.Random(f"{seed}-validation")
    requests = [Request(kind, composer.turn(kind, rng)) for kind in composer.validation for _ in range(each)]
    for _ in tqdm(writer.answer(requests, 0, rng), unit="batch", desc="writing validation text"):
        pass


def repeats(answer: Sequence[int]) -> bool:
    """Return whether the last ``SPAN`` tokens occur for the ``TIMES``-th time: a small model that repeats itself under
    greedy decoding does so for ever, which teaches a drafter nothing more.
    """
    text = "".join(map(chr, answer))  # searching a text is far faster than searching a list
    return len(answer) >= SPAN * TIMES and text.count(text[-SPAN:]) >= TIMES


def as_line(conversation: Conversation) -> str:
    """Return a conversation that the target wrote as a line of JSON."""
    line: dict[str, Any] = {"kind": conversation.kind, "round": conversation.round}
    if conversation.history:
        line["history"] = conversation.history
    if conversation.left:
        line["left"] = conversation.left
    return json.dumps(line | {"user": conversation.user, "answer_ids": conversation.answer_ids}) + "\n"


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text that is rendered by a chat template already."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def sampled_turns(
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_turn: int,
    opened: float,
    rng: random.Random,
) -> list[str]:
    """Let the target write ``count`` user turns, and return those that it completes within ``max_turn`` tokens."""
    openings = [rng.choice(OPENINGS) if rng.random() < opened else "" for _ in range(count)]
    prefixes = [user_prefix(tokenizer)] * count
    return [user for user in completed(target, tokenizer, prefixes, openings, max_turn, rng) if user.strip()]


def continued(writer: Writer, histories: Sequence[tuple[tuple[str, str], ...]], rng: random.Random) -> list[Request]:
    """Let the target write a user turn after each history; return those that it completes. Histories that leave no room
    for a turn in the target's context are left out."""
    room = writer.target.shape.context - writer.max_turn
    pairs = [(user_prefix(writer.tokenizer, history), history) for history in histories]
    pairs = [(prefix, history) for prefix, history in pairs if len(token_ids(writer.tokenizer, prefix)) <= room]
    prefixes, histories = [prefix for prefix, _ in pairs], [history for _, history in pairs]
    openings = [""] * len(prefixes)
    users = completed(writer.target, writer.tokenizer, prefixes, openings, writer.max_turn, rng)
    return [Request(FOLLOWING, user, history) for user, history in zip(users, histories, strict=True) if user.strip()]


def completed(
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    prefixes: Sequence[str],
    openings: Sequence[str],
    max_turn: int,
    rng: random.Random,
) -> list[str]:
    """Let the target write a user turn after each prefix and opening.

    Returns:
        The user turns, each with its opening; an empty text for those that are not completed in ``max_turn`` tokens.
    """
    if not prefixes:
        return []
    generator = torch.Generator(target.device).manual_seed(rng.getrandbits(63))
    eos, detokenize, users = {tokenizer.eos_token_id}, Detokenizer.of(tokenizer), []
    texts = [prefix + opening for prefix, opening in zip(prefixes, openings, strict=True)]
    starts = [token_ids(tokenizer, text) for text in texts]
    turns = generate_batch(
        target, starts, max_turn, eos, temperature=1.0, generator=generator, doing="writing user turns"
    )
    for opening, start, turn in zip(openings, starts, turns, strict=True):
        stream = TextStream(detokenize)  # after its start, the turn's first token keeps its leading space
        stream.push(start)
        users.append(opening + stream.push(turn[:-1]) + stream.finish() if turn[-1] in eos else "")
    return users


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of a JSONL file, each with ``user`` and ``answer_ids``, or ``assistant`` (text).

    Raises:
        ValueError: a line is malformed. Only the last line may be, because a killed run truncates it; it is left out.
    """
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    conversations = []
    for number, line in enumerate(lines, 1):
        try:
            conversation = Conversation.of(parse_json(line))
        except (KeyError, TypeError, ValueError, AttributeError):
            if number < len(lines):
                raise ValueError(
                    f'{path}:{number} is not a conversation; expected {{"user": "…", "assistant": "…"}} on one line'
                ) from None
            continue
        conversations.append(conversation)
    return conversations
