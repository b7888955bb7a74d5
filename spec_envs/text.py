"""From token ids to text, all at once or piece by piece as the ids come, and text that is safe to print on a terminal.

The pieces of a ``TextStream`` joined together are the text of all ids decoded at once. Those of the libraries are not:
``DecodeStream`` of tokenizers never returns half a character at the end of a text, and fails on single bytes that are
not UTF-8 (``ByteFallback`` then takes back the whole run of them); ``TextStreamer`` of transformers decodes each line
by itself, which loses the spaces of Llama 2's tokenizer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

HALF = "\ufffd"  # stands for a character of which bytes are missing
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # name of the token of a single byte in tokenizers with byte fallback
WINDOW, CONTEXT = 64, 16  # most ids that are decoded again for a piece, and how many of more are kept
# Control characters other than tab and newline, halves of surrogate pairs, and marks that turn the direction of
# writing.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Detokenizer:
    """Turns token ids into text, without special tokens.

    Args:
        decode: returns the text of a list of ids.
        joined: returns whether an id has no text of its own, because it is a byte decoded together with its neighbours.
    """

    def __init__(self, decode: Callable[[list[int]], str], joined: Callable[[int], bool] = lambda token: False):
        self._decode, self.joined = decode, joined

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Detokenizer:
        """Return the detokenizer of a tokenizer; it keeps spaces before punctuation, whatever the tokenizer's
        settings."""
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        falls_back = any(map(is_byte, names(tokenizer, byte_ids(tokenizer))))

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

        def joined(token: int) -> bool:  # a token without a name is skipped as special ones are
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


SILENT = Detokenizer(lambda ids: "")  # for decoders whose text is not needed


def names(tokenizer: Any, ids: Sequence[int]) -> list[str | None]:
    """Return a tokenizer's own names of tokens; None for ids that it does not have."""
    found: list[str | None] = tokenizer.convert_ids_to_tokens(list(ids))
    return found


def byte_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens of single bytes; without such tokens, the id of the unknown token."""
    ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return [token for token in ids if token is not None]


def is_byte(name: str | None) -> bool:
    """Return whether a token's name is that of a single byte."""
    return name is not None and BYTE.fullmatch(name) is not None


class TextStream:
    """A text whose ids arrive bit by bit.

    Each piece holds everything that later ids cannot change: half a character waits for its other half, a run of single
    bytes for its end. The pieces joined together, with the last one from ``finish``, are the text of all ids.

    Args:
        detokenize: turns ids into text, as in ``TextStream(decoder.detokenize)``.
    """

    def __init__(self, detokenize: Detokenizer):
        self.detokenize = detokenize
        self._ids: list[int] = []
        self._shown = ""  # the part of the text of these ids that was returned

    def push(self, ids: Sequence[int]) -> str:
        """Append ids and return the text that has become certain with them, which may be empty."""
        self._ids += ids
        certain = len(self._ids)
        while certain and self.detokenize.joined(self._ids[certain - 1]):
            certain -= 1
        piece = self._new(self.detokenize(self._ids[:certain]).rstrip(HALF))
        if len(self._ids) > WINDOW and certain == len(self._ids):
            self._shorten()
        return piece

    def finish(self) -> str:
        """Return the rest of the text; half a character becomes ``U+FFFD``."""
        return self._new(self.detokenize(self._ids))

    def _new(self, text: str) -> str:
        if len(text) <= len(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _shorten(self) -> None:
        """Forget the first ids if the last ones alone decode to the end of the text."""
        tail = self._ids[-CONTEXT:]
        text = self.detokenize(tail)
        if text.strip() and self._shown.endswith(text):
            self._ids, self._shown = tail, text


def after(detokenize: Detokenizer, before: int, token: int) -> str:
    """Return the text of ``token`` after ``before``, with the space that some tokenizers strip at the start of a
    text."""
    text, start = detokenize([before, token]), detokenize([before])
    return text[len(start) :] if text.startswith(start) else detokenize([token])


def printable(text: str) -> str:
    """Return a text that is safe to print on a terminal.

    Control characters other than tab and newline, and marks that change the direction of writing, become ``U+FFFD``.
    """
    return UNPRINTABLE.sub(HALF, text)


def reason(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class, safe to print."""
    line = next(iter(str(error).strip().splitlines()), "")
    return printable(line)[:200] or type(error).__name__


def encodable(text: str) -> str:
    """Return a text that every encoding of Unicode can represent.

    Half a surrogate pair becomes ``U+FFFD``, two halves become their character.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
