"""The protocol between edge and cloud: msgpack messages, and the packing of their contents.

A message is an array whose first element is its kind. The edge opens with ``Hello``, which the cloud answers with
``Welcome``; then each ``Verify`` is answered by a ``Verdict`` and each ``Plain`` by ``Tokens``, one message per token;
an ``Error`` may take the place of any answer. Token ids are little-endian arrays of the narrowest width that holds the
vocabulary, probabilities are arrays of floats.

There are four ways (``mode``) to send the distribution q of a drafted token x, all of them exact:

- ``ids``: q is not sent; for greedy decoding.
- ``scalar``: only q(x) is sent. After a rejection the cloud sends the target's logits once, and the edge draws from the
  residual (DSSD, arXiv 2507.12000).
- ``topk``: q cut to its k most probable tokens and rounded to float16 *before* the token was drawn; the same q̂ is used
  in the acceptance ratio and in the residual.
- ``full``: the same without the cut.
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

PORT, PORTS = 8765, 2**16 - 1  # default port of a cloud, and the highest port number
VERSION = 1
MODES = ("ids", "scalar", "topk", "full")
MAX_BYTES = 16 * 2**20  # most bytes of a message: 64 whole distributions over a vocabulary of more than 50,000

LOGITS = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, Meta(ge=0, le=1e6)]
Token = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Name = Annotated[str, Meta(max_length=16)]
Key = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Sent(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A distribution: token ids and their float16 weights; without ids, the weights of the whole vocabulary."""

    ids: bytes
    weights: bytes


class Hello(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=1):
    """The edge's first message on a connection.

    ``vocabulary`` is the ``vocabulary_hash`` of its tokenizer. ``session`` is its name for the session: 16 random
    bytes, with which it resumes the session after the connection was lost. ``temperature``, ``top_p`` and ``seed`` set
    the sampling.
    """

    version: int
    vocabulary: Key
    session: Key
    temperature: Annotated[float, Meta(ge=0, le=100)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    seed: Seed


class Welcome(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=2):
    """The answer to ``Hello``: the session is open.

    The cloud has ``have`` tokens of its text, accepts texts of up to ``context`` tokens, and its target has ``vocab``
    ids.
    """

    have: Count
    context: Count
    vocab: Count


class Verify(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=3):
    """A request to verify ``draft``, which follows the first ``at`` tokens of the text and then the tokens ``text``.

    ``probabilities`` are q(x) of the drafted tokens (float64) in mode ``scalar``, ``proposals`` their distributions in
    modes ``topk`` and ``full``. Without a draft the request is for the next token. ``number`` counts the edge's
    requests.
    """

    number: Count
    at: Count
    text: bytes
    draft: bytes
    mode: Name
    probabilities: bytes = b""
    proposals: Annotated[list[Sent], Meta(max_length=1024)] = []


class Verdict(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=4):
    """The answer to ``Verify``: how many drafted tokens were accepted, and the token after them.

    The token is -1 if the edge has to draw it from the residual of ``logits`` (mode ``scalar``; of the float type
    ``dtype``). ``seconds`` are those of the forwards that read this request, ``queued`` those that it waited for
    others.
    """

    number: Count
    accepted: Count
    token: Token
    seconds: Seconds
    queued: Seconds
    logits: bytes = b""
    dtype: Name = ""


class Plain(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=5):
    """A request to decode ``count`` tokens, or up to one of ``stop``, after the first ``at`` tokens of the text and the
    tokens ``text``."""

    number: Count
    at: Count
    text: bytes
    count: Annotated[int, Meta(ge=1, le=2**20)]
    stop: bytes


class Tokens(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=6):
    """One answer to ``Plain``: the next token, True if it is the last one, and the number before it (``index``)."""

    number: Count
    token: Count
    last: bool
    seconds: Seconds
    queued: Seconds
    index: Count


class Error(Struct, array_like=True, frozen=True, forbid_unknown_fields=True, tag=7):
    """The answer to a message that was refused: a code of ``CODES`` and a sentence with the reason."""

    code: str
    sentence: str


CODES = {
    "message": "not a message of this protocol",
    "version": "another version of the protocol",
    "vocabulary": "another vocabulary",
    "request": "a request that is not valid",
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
    """Raised for a message that cannot be served; ``code`` is one of ``CODES``."""

    def __init__(self, code: str, sentence: str):
        super().__init__(sentence)
        self.code = code

    def message(self) -> Error:
        """Return the message that reports this error."""
        return Error(self.code, str(self))


def encode(message: Message) -> bytes:
    """Return a message as bytes."""
    return _encoder.encode(message)


def decode(frame: Any) -> Message:
    """Return the message of a frame.

    Raises:
        Refused: the frame is not a message of this protocol.
    """
    if not isinstance(frame, bytes):
        raise Refused("message", "received a text frame; expected a binary one")
    try:
        message: Message = _decoder.decode(frame)
        return message
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused("message", f"{len(frame)} bytes are not a message of version {VERSION}: {error}") from None


def expect(message: Message, kind: type[M]) -> M:
    """Return a message if it is of one kind.

    Raises:
        Refused: the message reports an error, or is of another kind.
    """
    if isinstance(message, Error):
        raise Refused(message.code, message.sentence)
    if not isinstance(message, kind):
        raise Refused("message", f"received {type(message).__name__}; expected {kind.__name__}")
    return message


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return 16 bytes that are equal for two tokenizers only if they have the same tokens with the same ids."""
    pairs = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(pairs.encode()).digest()[:16]


def ids_dtype(vocab: int) -> np.dtype:
    """Return the narrowest integer type that holds a vocabulary's ids."""
    return np.dtype("<u2") if vocab <= 2**16 else np.dtype("<u4")


def pack_ids(ids: Any, vocab: int) -> bytes:
    """Return token ids as bytes."""
    return np.asarray(ids, ids_dtype(vocab)).tobytes()


def unpack_ids(data: bytes, vocab: int) -> np.ndarray:
    """Return the token ids ``[n]`` of bytes.

    Raises:
        Refused: the bytes end within an id, or an id is outside the vocabulary.
    """
    dtype = ids_dtype(vocab)
    if len(data) % dtype.itemsize:
        raise Refused("message", f"received {len(data)} bytes of token ids; expected a multiple of {dtype.itemsize}")
    ids = np.frombuffer(data, dtype).astype(np.int64)
    if len(ids) and ids.max() >= vocab:
        raise Refused("request", f"received token {ids.max()}; expected ids below {vocab}")
    return ids


def pack_proposal(proposal: Proposal, vocab: int) -> Sent:
    """Return a distribution as it is sent: with its ids or over the whole vocabulary, whichever is shorter.

    Raises:
        ValueError: its weights are not float16 numbers, so it was not rounded before the draft was drawn.
    """
    ids, weights = pack_ids(proposal.ids, vocab), proposal.weights.astype(np.float16)
    if (weights != proposal.weights).any():
        raise ValueError("a draft was drawn from a distribution that is not float16; set the drafter's top_k first")
    if len(ids) + weights.nbytes <= 2 * vocab:
        return Sent(ids, weights.astype("<f2").tobytes())
    dense = np.zeros(vocab, "<f2")
    dense[proposal.ids] = weights
    return Sent(b"", dense.tobytes())


def unpack_proposal(sent: Sent, vocab: int) -> np.ndarray:
    """Return the probabilities ``[vocab]`` (float64) of a distribution that was sent.

    Raises:
        Refused: the message is not a distribution.
    """
    if len(sent.weights) % 2:
        raise Refused("message", f"received {len(sent.weights)} bytes of float16 weights; expected an even number")
    weights = np.frombuffer(sent.weights, "<f2")
    ids = unpack_ids(sent.ids, vocab) if sent.ids else np.arange(vocab)
    if len(ids) != len(weights) or not len(ids):
        raise Refused("request", f"a distribution has {len(ids)} tokens and {len(weights)} weights")
    if not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise Refused("request", "the weights of a distribution are not all finite and positive")
    if sent.ids and len(np.unique(ids)) < len(ids):
        raise Refused("request", "a distribution has a token twice; expected different ones")
    kept = weights > 0
    return Proposal(ids[kept], weights[kept]).dense(vocab)


def pack_logits(logits: Tensor) -> tuple[bytes, str]:
    """Return a row of logits as bytes, and the name of its float type, so that both ends have the same numbers."""
    return logits.cpu().contiguous().view(torch.uint8).numpy().tobytes(), str(logits.dtype).removeprefix("torch.")


def unpack_logits(data: bytes, dtype: str, vocab: int) -> Tensor:
    """Return the row of logits ``[vocab]`` of bytes.

    Raises:
        Refused: the type is unknown, or the size is not that of the vocabulary.
    """
    if dtype not in LOGITS or len(data) != vocab * LOGITS[dtype].itemsize:
        raise Refused("message", f"received {len(data)} bytes of {dtype!r} logits for a vocabulary of {vocab}")
    return torch.frombuffer(bytearray(data), dtype=LOGITS[dtype])


def pack_floats(values: Any) -> bytes:
    """Return float64 numbers as bytes."""
    return np.asarray(values, "<f8").tobytes()


def unpack_floats(data: bytes) -> np.ndarray:
    """Return the float64 numbers ``[n]`` of bytes.

    Raises:
        Refused: the bytes end within a number.
    """
    if len(data) % 8:
        raise Refused("message", f"received {len(data)} bytes of float64 numbers; expected a multiple of 8")
    return np.frombuffer(data, "<f8")
