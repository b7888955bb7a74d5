"""From token ids to text: all at once, or piece by piece as the ids come; and text that a terminal may be shown.

The pieces of a ``TextStream`` are together what all ids decode to at once. The streams of the libraries are not: tokenizers'
``DecodeStream`` never gives what a text ends with if that is half a character, and fails on single bytes that are no UTF-8
(``ByteFallback`` then takes back the whole run of them); transformers' ``TextStreamer`` decodes each line by itself, which
loses the spaces of Llama 2's tokenizer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # stands for a character of which bytes are missing
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of a single byte, where the tokenizer falls back on those
WINDOW, CONTEXT = 64, 16  # ids that are decoded again for a piece, and how many are kept when there are more
# Control characters other than tab and newline, halves of surrogate pairs, and marks that turn the direction of writing.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Detokenizer:
    """Text of token ids, without special tokens.

    Args:
        decode: gives the text of some ids.
        joined: whether an id has no text of its own: it is a byte that is read together with those beside it.
    """

    def __init__(self, decode: Callable[[list[int]], str], joined: Callable[[int], bool] = lambda token: False):
        self._decode, self.joined = decode, joined

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Detokenizer:
        """Return the detokenizer of a tokenizer. Spaces before punctuation stay, whatever the tokenizer's settings."""
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        falls_back = any(map(is_byte, names(tokenizer, byte_ids(tokenizer))))

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        def joined(token: int) -> bool:  # a token without a name is the model's alone, and skipped as special ones are
            [name] = names(tokenizer, [token])
            return name is None or token in special or is_byte(name)

        return cls(decode, joined) if falls_back else cls(decode)

    @classmethod
    def when_needed(cls, load: Callable[[], PreTrainedTokenizerBase]) -> Detokenizer:
        """Return the detokenizer of a tokenizer that is loaded when the first text is asked for."""
        loaded = functools.cache(lambda: cls.of(load()))
        return cls(lambda ids: loaded()(ids), lambda token: loaded().joined(token))

    def __call__(self, ids: Sequence[int]) -> str:
        return self._decode(list(ids))


SILENT = Detokenizer(lambda ids: "")  # where nobody looks at the text


def names(tokenizer: Any, ids: Sequence[int]) -> list[str | None]:
    """Return a tokenizer's own names of tokens, None for ids that it does not have."""
    return tokenizer.convert_ids_to_tokens(list(ids))


def byte_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens of single bytes, or of whatever stands for unknown tokens where there are none."""
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return [token for token in ids if token is not None]


def is_byte(name: str | None) -> bool:
    """Return whether a token's name is that of a single byte."""
    return name is not None and BYTE.fullmatch(name) is not None


class TextStream:
    """A text whose ids come bit by bit.

    Each piece holds all that later ids cannot change: half a character waits for its other half, a run of single bytes for
    its end. All pieces with the last one, which ``finish`` returns, are what all ids decode to.

    Args:
        detokenize: of the ids, as decoders have it: ``TextStream(decoder.detokenize)``.
    """

    def __init__(self, detokenize: Detokenizer):
        self.detokenize = detokenize
        self._ids: list[int] = []
        self._shown = ""  # of the text of these ids

    def push(self, ids: Sequence[int]) -> str:
        """Return what is certain now, with these ids, and was not before; often nothing."""
        self._ids += ids
        certain = len(self._ids)
        while certain and self.detokenize.joined(self._ids[certain - 1]):
            certain -= 1
        piece = self._new(self.detokenize(self._ids[:certain]).rstrip(HALF))
        if len(self._ids) > WINDOW and certain == len(self._ids):
            self._shorten()
        return piece

    def finish(self) -> str:
        """Return the rest, half a character as ``U+FFFD``."""
        return self._new(self.detokenize(self._ids))

    def _new(self, text: str) -> str:
        if len(text) <= len(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _shorten(self) -> None:
        """Forget the first ids, where the last ones by themselves decode to the end of the text."""
        tail = self._ids[-CONTEXT:]
        text = self.detokenize(tail)
        if text.strip() and self._shown.endswith(text):
            self._ids, self._shown = tail, text


def after(detokenize: Detokenizer, before: int, token: int) -> str:
    """Return the text of a token after another one, with the space that some tokenizers take off the first of a text."""
    text, start = detokenize([before, token]), detokenize([before])
    return text[len(start) :] if text.startswith(start) else detokenize([token])


def printable(text: str) -> str:
    """Return a text that does nothing to a terminal but print: control characters other than tab and newline, and marks that
    turn the direction of writing, are replaced by ``U+FFFD``."""
    return UNPRINTABLE.sub(HALF, text)


def reason(error: Exception) -> str:
    """Return the first line of an error's message, or what kind it is, fit to be printed."""
    line = next(iter(str(error).strip().splitlines()), "")
    return printable(line)[:200] or type(error).__name__


def encodable(text: str) -> str:
    """Return a text that every encoding of Unicode has: half a surrogate pair becomes ``U+FFFD``, two halves their
    character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
