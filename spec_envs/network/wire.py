"""What edge and cloud say to each other: msgpack messages, and how many bytes they are.

A message is an array whose first element tells its kind. The edge opens with ``Hello``, which the cloud answers with
``Welcome``; then each ``Verify`` is answered by a ``Verdict`` and each ``Plain`` by ``Tokens``, one message per token; an
``Error`` may take the place of any answer. Token ids are little-endian arrays of the narrowest width that holds the
vocabulary, probabilities are arrays of floats.

How a drafted token's distribution q is told (``mode``), every one of them exact:

- ``ids``: not at all; for greedy decoding.
- ``scalar``: q(x) of the drafted tokens alone. On a rejection the target's logits come down once and the edge draws from
  the residual (DSSD, arXiv 2507.12000).
- ``topk``: q cut to its k most probable tokens and rounded to float16 *before* the token was drawn; the same q̂ stands in
  the acceptance ratio and in the residual.
- ``full``: the same, uncut.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import torch
from msgspec import Meta, Struct
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spec_envs.decoding.sampling import Proposal

PORT, PORTS = 8765, 2**16 - 1  # of a cloud by default, and the highest there is
VERSION = 1
MODES = ("ids", "scalar", "topk", "full")
MAX_BYTES = 16 * 2**20  # of a message: 64 whole distributions of a vocabulary of 50,000 and more

LOGITS = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Token = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Name = Annotated[str, Meta(max_length=16)]
Key = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Sent(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A distribution: token ids (empty where the weights are of the whole vocabulary, in order) and float16 weights."""

    ids: bytes
    weights: bytes


class Hello(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """The edge's first message on a connection.

    ``vocabulary`` is ``vocabulary_hash`` of its tokenizer, ``session`` what it calls its session (16 random bytes, by which
    it finds it again after the connection was lost), ``temperature``, ``top_p`` and ``seed`` the sampling's.
    """

    version: int
    vocabulary: Key
    session: Key
    temperature: Annotated[float, Meta(ge=0, le=100)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    seed: Seed


class Welcome(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2):
    """The session is open; the cloud has ``have`` tokens of its text, and texts of up to ``context`` tokens."""

    have: Count
    context: Count
    vocab: Count


class Verify(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=3):
    """Judge a draft: behind the first ``at`` tokens of the text and the tokens ``text``, ``draft`` was drawn.

    ``chances`` are q(x) of the drafted tokens (float64), with mode ``scalar``; ``proposals`` their distributions, with
    ``topk`` and ``full``. Without a draft this asks for the next token. ``number`` counts the edge's requests.
    """

    number: Count
    at: Count
    text: bytes
    draft: bytes
    mode: Name
    chances: bytes = b""
    proposals: Annotated[list[Sent], Meta(max_length=1024)] = []


class Verdict(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=4):
    """How many drafted tokens were kept, and the token behind them; -1 where the edge is to draw it from the residual of
    these ``logits`` (mode ``scalar``; of the float type ``dtype``). ``seconds`` of the forwards that read this request, and
    ``queued`` the others that it waited, for forwards of other requests alone."""

    number: Count
    accepted: Count
    token: Token
    seconds: Seconds
    queued: Seconds
    logits: bytes = b""
    dtype: Name = ""


class Plain(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=5):
    """Decode ``count`` tokens, or up to one of ``stop``, behind the first ``at`` tokens of the text and ``text``."""

    number: Count
    at: Count
    text: bytes
    count: Annotated[int, Meta(ge=1, le=2**20)]
    stop: bytes


class Tokens(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=6):
    """The next token of plain decoding, whether it is the last one, and how many came before it."""

    number: Count
    token: Count
    last: bool
    seconds: Seconds
    queued: Seconds
    index: Count


class Error(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=7):
    """Why a message was refused: a code of ``CODES`` and a sentence."""

    code: str
    sentence: str


CODES = {
    "message": "not a message of this protocol",
    "version": "another version of it",
    "vocabulary": "another vocabulary",
    "request": "a request that makes no sense",
    "limit": "more than the cloud allows",
    "busy": "no session is free; try again later",
    "draining": "the cloud is shutting down; try again later",
    "internal": "the cloud failed; try again",
}
LATER = ("busy", "draining", "internal")  # codes after which trying again may help

Message = Hello | Welcome | Verify | Verdict | Plain | Tokens | Error
M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


class Refused(ValueError):
    """A message that cannot be served; ``code`` is one of ``CODES``."""

    def __init__(self, code: str, sentence: str):
        super().__init__(sentence)
        self.code = code

    def message(self) -> Error:
        """As it is sent."""
        return Error(self.code, str(self))


def encode(message: Message) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode(frame: Any) -> Message:
    """A message from bytes.

    Raises:
        Refused: they are none.
    """
    if not isinstance(frame, bytes):
        raise Refused("message", "a text frame came in; expected a binary one")
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused("message", f"{len(frame)} bytes that are no message of version {VERSION}: {error}") from None


def expect(message: Message, kind: type[M]) -> M:
    """A message that has to be of one kind.

    Raises:
        Refused: it is an error, or of another kind.
    """
    if isinstance(message, Error):
        raise Refused(message.code, message.sentence)
    if not isinstance(message, kind):
        raise Refused("message", f"a {type(message).__name__} came in; expected {kind.__name__}")
    return message


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """16 bytes that two tokenizers share only if they have the same tokens with the same ids."""
    pairs = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(pairs.encode()).digest()[:16]


def ids_dtype(vocab: int) -> np.dtype:
    """The narrowest integers that hold a vocabulary's ids."""
    return np.dtype("<u2") if vocab <= 2**16 else np.dtype("<u4")


def pack_ids(ids: Any, vocab: int) -> bytes:
    """Token ids as bytes."""
    return np.asarray(ids, ids_dtype(vocab)).tobytes()


def unpack_ids(data: bytes, vocab: int) -> np.ndarray:
    """Token ids ``[n]`` from bytes.

    Raises:
        Refused: half an id, or one beyond the vocabulary.
    """
    dtype = ids_dtype(vocab)
    if len(data) % dtype.itemsize:
        raise Refused("message", f"{len(data)} bytes of token ids; expected a multiple of {dtype.itemsize}")
    ids = np.frombuffer(data, dtype).astype(np.int64)
    if len(ids) and ids.max() >= vocab:
        raise Refused("request", f"token {ids.max()} came in; the vocabulary has {vocab}")
    return ids


def pack_proposal(proposal: Proposal, vocab: int) -> Sent:
    """A distribution as it is sent: with its ids, or over the whole vocabulary, whichever is shorter.

    Raises:
        ValueError: its weights are not those of float16: it was not rounded before it was drawn from.
    """
    ids, weights = pack_ids(proposal.ids, vocab), proposal.weights.astype(np.float16)
    if (weights != proposal.weights).any():
        raise ValueError("a draft was drawn from a distribution that cannot be sent; set the drafter's top_k first")
    if len(ids) + weights.nbytes <= 2 * vocab:
        return Sent(ids, weights.astype("<f2").tobytes())
    dense = np.zeros(vocab, "<f2")
    dense[proposal.ids] = weights
    return Sent(b"", dense.tobytes())


def unpack_proposal(sent: Sent, vocab: int) -> np.ndarray:
    """Probabilities ``[vocab]`` (float64) from what was sent.

    Raises:
        Refused: no distribution.
    """
    if len(sent.weights) % 2:
        raise Refused("message", f"{len(sent.weights)} bytes of float16 weights; expected an even number")
    weights = np.frombuffer(sent.weights, "<f2")
    ids = unpack_ids(sent.ids, vocab) if sent.ids else np.arange(vocab)
    if len(ids) != len(weights) or not len(ids):
        raise Refused("request", f"a distribution has {len(ids)} tokens and {len(weights)} weights")
    if not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise Refused("request", "the weights of a distribution are not all finite and positive")
    if sent.ids and len(np.unique(ids)) < len(ids):
        raise Refused("request", "a token stands twice in a distribution")
    kept = weights > 0
    return Proposal(ids[kept], weights[kept]).dense(vocab)


def pack_logits(logits: Tensor) -> tuple[bytes, str]:
    """A row of logits as bytes of its own float type, so that both ends make the same distribution of it."""
    return logits.cpu().contiguous().view(torch.uint8).numpy().tobytes(), str(logits.dtype).removeprefix("torch.")


def unpack_logits(data: bytes, dtype: str, vocab: int) -> Tensor:
    """A row of logits ``[vocab]``.

    Raises:
        Refused: they are not that.
    """
    if dtype not in LOGITS or len(data) != vocab * LOGITS[dtype].itemsize:
        raise Refused("message", f"{len(data)} bytes of {dtype!r} logits came in for a vocabulary of {vocab}")
    return torch.frombuffer(bytearray(data), dtype=LOGITS[dtype])


def pack_floats(values: Any) -> bytes:
    """Float64 numbers as bytes."""
    return np.asarray(values, "<f8").tobytes()


def unpack_floats(data: bytes) -> np.ndarray:
    """Float64 numbers ``[n]`` from bytes.

    Raises:
        Refused: half a number.
    """
    if len(data) % 8:
        raise Refused("message", f"{len(data)} bytes of float64 numbers; expected a multiple of 8")
    return np.frombuffer(data, "<f8")
