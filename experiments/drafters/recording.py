"""Recordings that a drafter learns from: the target's hidden states over its own text, computed once for all drafters.

The target's distribution is recorded as the final normed hidden state, from which the output head computes the
probabilities over any draft vocabulary. States are kept as int8 with a scale for every ``GROUP`` of them, because a few
of a row's states are a thousand times as large as the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from spec_envs.decoding.model.batch import read_batch
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.experiments.drafters.selftext import Conversation
from spec_envs.files import held, whole
from spec_envs.prompts.sets import encode

SHARD = 256  # conversations in a file
GROUP = 32  # states that share a scale


@dataclass(frozen=True)
class Text:
    """A conversation in tokens.

    Attributes:
        ids: token ids of the whole conversation.
        answer: position where the answer begins.
        kind: name of what the user asks for; it may be empty.
    """

    ids: list[int]
    answer: int
    kind: str = ""


@dataclass(frozen=True)
class States:
    """Hidden states in int8.

    Attributes:
        values: ``[n, width]``.
        scales: of each group of values, ``[n, width / group]``, bfloat16.
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, states: Tensor) -> States:
        """Return states ``[n, width]`` rounded to the nearest multiples of their groups' scales."""
        grouped = states.float().unflatten(-1, (-1, math.gcd(GROUP, states.shape[-1])))
        scales = (grouped.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30).bfloat16()
        values = (grouped / scales.float()).round().clamp(-127, 127).to(torch.int8)
        return cls(values.flatten(-2), scales[..., 0])

    def split(self, lengths: list[int]) -> Iterator[States]:
        """Yield the states of each text; ``lengths`` are their numbers of tokens."""
        for values, scales in zip(self.values.split(lengths), self.scales.split(lengths), strict=True):
            yield States(values, scales)

    def restored(self, device: torch.device) -> Tensor:
        """Return the states in float32, ``[n, width]``."""
        values, scales = self.values.to(device).float(), self.scales.to(device).float()
        restored: Tensor = (values.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)
        return restored


@dataclass(frozen=True)
class Example:
    """A recorded conversation.

    Attributes:
        ids: token ids ``[n]``.
        answer: position where the answer begins.
        kind: see ``Text``.
        features: hidden states of the captured layers ``[n, 3·hidden]``.
        final: normed hidden states after the last layer ``[n, hidden]``.
    """

    ids: Tensor
    answer: int
    kind: str
    features: States
    final: States


def tokenized(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Text:
    """Return a whole conversation in tokens."""
    prompt = encode(tokenizer, conversation.user, history=conversation.history)
    answer = conversation.answer_ids
    if conversation.assistant is not None:
        answer = tokenizer(conversation.assistant, add_special_tokens=False)["input_ids"]
        if conversation.complete:
            answer = [*answer, tokenizer.eos_token_id]
    return Text(prompt + answer, len(prompt), conversation.kind)


def record(target: Transformer, texts: Sequence[Text], folder: Path, capture: tuple[int, ...]) -> list[Path]:
    """Write a safetensors file for every ``SHARD`` texts, unless it exists, and return the files.

    Args:
        capture: layers whose hidden states are recorded.

    Raises:
        ValueError: a file holds other texts.
    """
    shards = [texts[i : i + SHARD] for i in range(0, len(texts), SHARD)]
    paths = [folder / f"{i:05d}.safetensors" for i in range(len(shards))]
    with held(folder, "recording hidden states"):
        for path, shard in zip(paths, tqdm(shards, unit="shard", desc="recording hidden states"), strict=True):
            shard = sorted(shard, key=lambda text: len(text.ids))
            if not path.exists():
                save_shard(path, *recorded(target, shard, capture))
            elif shard_lengths(path) != [len(text.ids) for text in shard]:
                raise ValueError(f"{path} holds other texts; delete {folder}, or choose another --work")
    return paths


def recorded(
    target: Transformer, texts: Sequence[Text], capture: tuple[int, ...]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file. The texts are read one at a time, which the kernels do faster than
    in batches with padding."""
    features, final = [], []
    for text in texts:
        captured, normed = read_batch(target, [text.ids], capture)
        features.append(States.of(captured[0].cpu()))
        final.append(States.of(normed[0].cpu()))
    tensors = {
        "ids": torch.tensor([token for text in texts for token in text.ids], dtype=torch.int32),
        "lengths": torch.tensor([len(text.ids) for text in texts]),
        "answers": torch.tensor([text.answer for text in texts]),
    }
    for name, states in (("features", features), ("final", final)):
        tensors[name] = torch.cat([part.values for part in states])
        tensors[f"{name}_scales"] = torch.cat([part.scales for part in states])
    return tensors, {"kinds": json.dumps([text.kind for text in texts])}


def save_shard(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of recordings, whole or not at all."""
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata)


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
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"cannot read {path} ({error}); delete it and run the command again") from None


def load_shard(path: Path) -> list[Example]:
    """Return the conversations in a file, the shortest first."""
    with readable(path), safe_open(path, "pt") as file:
        kinds = json.loads(file.metadata()["kinds"])
        lengths, answers = (file.get_tensor(name).tolist() for name in ("lengths", "answers"))
        ids = torch.split(file.get_tensor("ids").long(), lengths)
        states = [
            States(file.get_tensor(name), file.get_tensor(f"{name}_scales")).split(lengths)
            for name in ("features", "final")
        ]
        return [Example(*parts) for parts in zip(ids, answers, kinds, *states, strict=True)]
