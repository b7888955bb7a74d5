"""Text that the target writes itself: what its drafter learns from, so that no data set is needed.

A user turn is sampled at temperature 1 from the bare chat template (the model then writes the kind of request it
was tuned on), then the target answers it greedily. One conversation is one JSON line.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from spec_envs.decoding.batch import generate_batch
from spec_envs.decoding.transformer import Transformer
from spec_envs.prompts import decode, encode

MARK = "\x00turn\x00"

# How some user turns begin, so that every kind of task occurs; the model writes the rest.
OPENINGS = (
    "Summarize the following article.\n\n",
    "Summarize this text in one sentence.\n\n",
    "Complete the following Python function.\n\ndef ",
    "Write a Python function that ",
    "Solve this problem step by step: ",
    "How many ",
    "Explain ",
    "Write a short ",
)


def user_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template up to the place where the first user turn begins."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    return str(text).split(MARK)[0]


def write_conversations(
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    tokens: int,
    batch: int = 128,
    max_turn: int = 160,
    max_answer: int = 224,
    opened: float = 0.4,
    seed: int = 0,
) -> None:
    """Append conversations to ``path`` until it holds ``tokens`` answer tokens.

    Args:
        batch: answers written at once; three times as many user turns, which are shorter, are sampled at once.
        max_turn, max_answer: limits in tokens; a longer turn is dropped, a longer answer is cut.
        opened: share of the user turns that start with one of ``OPENINGS``.
    """
    conversations = read_conversations(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations))  # without a line cut short
    written = sum(len(c["answer_ids"]) for c in conversations)
    eos = {tokenizer.eos_token_id}
    prefix = user_prefix(tokenizer)
    with (
        tqdm(total=tokens, initial=min(written, tokens), unit="tok", desc="writing text") as bar,
        path.open("a") as file,
    ):
        barren = 0  # rounds in a row without a finished user turn
        while written < tokens:
            rng = random.Random(f"{seed}-{written}-{barren}")  # a resumed run draws what an undisturbed one would
            generator = torch.Generator(target.device).manual_seed(rng.getrandbits(63))
            openings = [rng.choice(OPENINGS) if rng.random() < opened else "" for _ in range(3 * batch)]
            starts = [tokenizer(prefix + o, add_special_tokens=False)["input_ids"] for o in openings]
            turns = generate_batch(target, starts, max_turn, eos, temperature=1.0, generator=generator)
            users = [o + decode(tokenizer, t[:-1]) for o, t in zip(openings, turns, strict=True) if t[-1] in eos]
            users = [user for user in users if user.strip()]
            barren = 0 if users else barren + 1
            if barren == 3:
                raise ValueError("the target ends no user turn of its own; give --conversations and --tokens 0")
            for first in range(0, len(users), batch):
                group = users[first : first + batch]
                answers = generate_batch(target, [encode(tokenizer, user) for user in group], max_answer, eos)
                for user, answer in zip(group, answers, strict=True):
                    file.write(json.dumps({"user": user, "answer_ids": answer}) + "\n")
                    written += len(answer)
                file.flush()
                bar.update(min(written, tokens) - bar.n)


def read_conversations(path: Path) -> list[dict]:
    """Conversations of a JSONL file, each with ``user`` and ``answer_ids``, or ``assistant`` (text).

    Raises:
        ValueError: a malformed line; the last one may be cut short by a killed run and is left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    conversations = []
    for number, line in enumerate(lines, 1):
        try:
            conversations.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON ({error}); expected a conversation per line") from None
    return conversations
