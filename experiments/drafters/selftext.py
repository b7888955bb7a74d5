"""Text that the target writes itself and that its drafter learns from, so that no data set is needed.

User turns are composed (``turns.py``), or sampled at temperature 1 from the bare chat template, after which the model
writes the kind of request that it was tuned on. The target answers them greedily. Each conversation is a line of JSON.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from spec_envs.decoding.model.batch import generate_batch
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.experiments.drafters.turns import OPENINGS, composed_turn, training_turns
from spec_envs.files import whole
from spec_envs.prompts.sets import decode, encode
from spec_envs.prompts.templates import rendered
from spec_envs.text import Detokenizer, TextStream

SMALLEST, SHARE = 8, 100  # least texts of a batch, and tokens in all for each text of it
MARK = "\x00turn\x00"


@dataclass(frozen=True)
class Conversation:
    """A user turn and its answer.

    Attributes:
        answer_ids: token ids of the answer; empty if the answer is given as text.
        assistant: text of the answer; EOS follows it if it is ``complete``.
    """

    user: str
    answer_ids: list[int]
    assistant: str | None = None
    complete: bool = True

    @classmethod
    def of(cls, line: Any) -> Conversation:
        """Return the conversation that a line of JSON holds.

        Raises:
            TypeError, KeyError, AttributeError: the line holds no conversation.
        """
        ids, text = line.get("answer_ids"), line.get("assistant")
        if not isinstance(line["user"], str) or not isinstance(text if ids is None else ids, list | str):
            raise TypeError
        return cls(line["user"], ids or [], text if ids is None else None, line.get("complete", True))


def user_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of the chat template before the first user turn."""
    return rendered(tokenizer, [("user", MARK)], answer=False).split(MARK)[0]


def write_conversations(
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    tokens: int,
    batch: int = 128,
    max_turn: int = 160,
    max_answer: int = 224,
    longest: int = 1024,
    opened: float = 0.4,
    composed: float = 0.5,
    seed: int = 0,
) -> None:
    """Append conversations to ``path`` until it holds ``tokens`` answer tokens.

    Args:
        batch: most answers in a batch; user turns, which are shorter, are sampled twice as many at a time.
        max_turn, max_answer: most tokens; a longer turn is dropped, a longer answer is cut.
        longest: most tokens of turn and answer together; longer turns are dropped.
        opened: share of the sampled user turns that start with one of ``OPENINGS``.
        composed: share of the user turns that are composed.

    Raises:
        ValueError: ``longest`` is too small, or the target completes no user turn.
    """
    if longest <= max_answer:
        raise ValueError(f"longest is {longest}; expected more than an answer's {max_answer} tokens")
    conversations = read_conversations(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:  # without a truncated last line
        temporary.write_text("".join(map(as_line, conversations)))
    written = sum(len(c.answer_ids) for c in conversations)
    eos = {tokenizer.eos_token_id}
    batch = min(batch, max(SMALLEST, tokens // SHARE))  # several batches even for little text
    answered = {c.user for c in conversations}
    shipped = [turn for turn in training_turns() if turn not in answered]
    with (
        tqdm(total=tokens, initial=min(written, tokens), unit="tok", desc="writing text") as bar,
        path.open("a") as file,
    ):
        barren = 0  # consecutive rounds without a user turn to answer
        while written < tokens:
            rng = random.Random(f"{seed}-{written}-{barren}")
            users = sampled_turns(target, tokenizer, 2 * batch, max_turn, opened, rng) + shipped
            shipped = []
            texts = [decode(tokenizer, c.answer_ids) for c in rng.sample(conversations, min(400, len(conversations)))]
            users += [composed_turn(rng, texts) for _ in range(round(len(users) * composed / (1 - composed)))]
            prompts = sorted(((encode(tokenizer, user), user) for user in users), key=lambda pair: len(pair[0]))
            prompts = [(ids, user) for ids, user in prompts if len(ids) + max_answer <= longest]
            barren = 0 if prompts else barren + 1
            if barren == 3:
                raise ValueError("the target completes no user turn; give --conversations and --tokens 0")
            groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
            rng.shuffle(groups)  # so that an interrupted round lacks texts of every length, not only the longest
            for group in groups:
                if written >= tokens:
                    break
                answers = generate_batch(target, [ids for ids, _ in group], max_answer, eos, doing="answering")
                new = [Conversation(user, answer) for (_, user), answer in zip(group, answers, strict=True)]
                file.writelines(map(as_line, new))
                conversations += new
                written += sum(map(len, answers))
                file.flush()
                bar.update(min(written, tokens) - bar.n)


def as_line(conversation: Conversation) -> str:
    """Return a conversation that the target wrote as a line of JSON."""
    return json.dumps({"user": conversation.user, "answer_ids": conversation.answer_ids}) + "\n"


def sampled_turns(
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    max_turn: int,
    opened: float,
    rng: random.Random,
) -> list[str]:
    """Let the target write ``count`` user turns, and return those that it completes within ``max_turn`` tokens."""
    generator = torch.Generator(target.device).manual_seed(rng.getrandbits(63))
    prefix, eos = user_prefix(tokenizer), {tokenizer.eos_token_id}
    openings = [rng.choice(OPENINGS) if rng.random() < opened else "" for _ in range(count)]
    starts = [tokenizer(prefix + opening, add_special_tokens=False)["input_ids"] for opening in openings]
    turns = generate_batch(
        target, starts, max_turn, eos, temperature=1.0, generator=generator, doing="writing user turns"
    )
    detokenize, users = Detokenizer.of(tokenizer), []
    for opening, start, turn in zip(openings, starts, turns, strict=True):
        if turn[-1] in eos:
            stream = TextStream(detokenize)  # after its start, the turn's first token keeps its leading space
            stream.push(start)
            users.append(opening + stream.push(turn[:-1]) + stream.finish())
    return [user for user in users if user.strip()]


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of a JSONL file, each with ``user`` and ``answer_ids``, or ``assistant`` (text).

    Raises:
        ValueError: a line is malformed. Only the last line may be, because a killed run truncates it; it is left out.
    """
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    conversations = []
    for number, line in enumerate(lines, 1):
        try:
            conversation = Conversation.of(json.loads(line))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            if number < len(lines):
                raise ValueError(
                    f'{path}:{number} is not a conversation; expected {{"user": "…", "assistant": "…"}} on one line'
                ) from None
            continue
        conversations.append(conversation)
    return conversations
