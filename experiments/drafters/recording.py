"""Recordings that a drafter learns from: the target's hidden states over its own text, computed once.

The target's distribution is recorded as the final normed hidden state, from which the output head computes the
probabilities over any draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from spec_envs.decoding.model.batch import read_batch
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.experiments.drafters.selftext import Conversation
from spec_envs.files import held, whole
from spec_envs.prompts.sets import encode

SHARD = 256  # conversations in a file


@dataclass
class Example:
    """A recorded conversation.

    Attributes:
        ids: token ids ``[n]``.
        answer: position where the answer begins.
        features: hidden states of the captured layers ``[n, 3·hidden]``.
        final: normed hidden states after the last layer ``[n, hidden]``.
    """

    ids: Tensor
    answer: int
    features: Tensor
    final: Tensor


def tokenized(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> tuple[list[int], int]:
    """Return the ids of a whole conversation, and the position where the answer begins."""
    prompt = encode(tokenizer, conversation.user, history=conversation.history)
    answer = conversation.answer_ids
    if conversation.assistant is not None:
        answer = tokenizer(conversation.assistant, add_special_tokens=False)["input_ids"]
        if conversation.complete:
            answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, len(prompt)


def record(
    target: Transformer,
    conversations: list[tuple[list[int], int]],
    folder: Path,
    capture: tuple[int, ...],
    batch: int = 8,
) -> list[Path]:
    """Write a safetensors file for every ``SHARD`` conversations, unless it exists, and return the files.

    Args:
        conversations: token ids of each, and the position where its answer begins.
        capture: layers whose hidden states are recorded.
        batch: conversations in a forward.
    """
    with held(folder, "recording hidden states"):
        return record_shards(target, conversations, folder, capture, batch)


def record_shards(
    target: Transformer, conversations: list[tuple[list[int], int]], folder: Path, capture: tuple[int, ...], batch: int
) -> list[Path]:
    """Write the files of ``record``; the caller holds the lock of the folder."""
    shards = [conversations[i : i + SHARD] for i in range(0, len(conversations), SHARD)]
    paths = [folder / f"{i:05d}.safetensors" for i in range(len(shards))]
    for path, shard in zip(paths, tqdm(shards, unit="shard", desc="recording hidden states"), strict=True):
        if path.exists():
            continue
        shard = sorted(shard, key=lambda c: len(c[0]))
        features, final = [], []
        for first in range(0, len(shard), batch):
            texts = [ids for ids, _ in shard[first : first + batch]]
            f, h = read_batch(target, texts, capture)
            width = f.shape[1]
            for row, ids in enumerate(texts):
                features.append(f[row, width - len(ids) :].to("cpu", target.precision.cache))
                final.append(h[row, width - len(ids) :].to("cpu", target.precision.cache))
        tensors = {
            "ids": torch.tensor([t for ids, _ in shard for t in ids], dtype=torch.int32),
            "lengths": torch.tensor([len(ids) for ids, _ in shard]),
            "answers": torch.tensor([answer for _, answer in shard]),
            "features": torch.cat(features),
            "final": torch.cat(final),
        }
        save_shard(path, tensors)
    return paths


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of recordings, whole or not at all."""
    with whole(path) as temporary:
        save_file(tensors, temporary)


def shard_lengths(path: Path) -> list[int]:
    """Return the numbers of tokens of the conversations in a file, in ascending order."""
    with readable(path), safe_open(path, "pt") as file:
        return list(map(int, file.get_tensor("lengths")))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors about a damaged file of recordings into one sentence.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    try:
        yield
    except (SafetensorError, KeyError, OSError, RuntimeError) as error:
        raise ValueError(f"cannot read {path} ({error}); delete it and run the command again") from None


def load_shard(path: Path) -> list[Example]:
    """Return the conversations in a file, the shortest first."""
    with readable(path):
        tensors = load_file(path)
        lengths, answers = (tensors[name].tolist() for name in ("lengths", "answers"))
        columns = [torch.split(tensors[name], lengths) for name in ("ids", "features", "final")]
    return [
        Example(ids.long(), answer, features, final)
        for answer, ids, features, final in zip(answers, *columns, strict=True)
    ]
