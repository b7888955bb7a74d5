"""Checks of a cloud's answers, which an edge makes before it uses them."""

from __future__ import annotations

from collections.abc import Collection

from spec_envs.network.wire import Refused, Tokens, Verdict, Welcome, unpack_logits

SHOWN = 300  # most characters of a received text that an error repeats


class InvalidAnswer(ValueError):
    """Raised for an answer that violates the protocol."""


def one_line(text: str) -> str:
    """Return a text as one line that is safe to print: control characters become blanks, and a long text is cut."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return clean if len(clean) <= SHOWN else f"{clean[:SHOWN]}…"


def check_welcome(welcome: Welcome, vocab: int, tokens: int) -> None:
    """Refuse the greeting of a cloud that has another target.

    Args:
        vocab: number of token ids of the edge's target.
        tokens: length of the text so far; the cloud cannot have more of it.

    Raises:
        InvalidAnswer: the cloud has another vocabulary, has no room for a text, or has more of the text than was sent.
    """
    if welcome.vocab != vocab:
        raise InvalidAnswer(
            f"the cloud's target has {welcome.vocab} token ids and the edge's {vocab}; give both the same target"
        )
    if welcome.context < 2:
        raise InvalidAnswer(f"the cloud takes texts of {welcome.context} tokens; expected 2 or more")
    if welcome.have > tokens:
        raise InvalidAnswer(f"the cloud has {welcome.have} tokens of a text of {tokens}; its answers cannot be trusted")


def check_verdict(verdict: Verdict, drafted: int, mode: str, vocab: int) -> None:
    """Refuse a verdict that does not fit the draft.

    Args:
        drafted: number of tokens of the draft.
        mode: how its distributions were sent.

    Raises:
        InvalidAnswer: more tokens were accepted than were drafted, or the token after them does not exist.
    """
    if verdict.accepted > drafted:
        raise InvalidAnswer(
            f"the cloud accepted {verdict.accepted} tokens of a draft of {drafted}; it cannot be trusted"
        )
    if verdict.token >= 0:
        check_token(verdict.token, vocab)
        return
    if mode != "scalar" or verdict.accepted == drafted:
        raise InvalidAnswer("the cloud's verdict has no token, which it needs here; it cannot be trusted")
    try:
        logits = unpack_logits(verdict.logits, verdict.dtype, vocab)
    except Refused as refused:
        raise InvalidAnswer(f"the cloud's verdict is malformed: {refused}") from None
    if logits.isnan().any() or logits.max().isinf():
        raise InvalidAnswer("the cloud's verdict has logits that are not finite; it cannot be trusted")


def check_tokens(tokens: Tokens, had: int, count: int, stop: Collection[int], vocab: int) -> None:
    """Refuse a token of a stream that does not fit the request.

    Args:
        had: number of tokens before this one.
        count, stop: length and stop tokens of the request.

    Raises:
        InvalidAnswer: the token does not exist, or the stream ends too early or not at all.
    """
    check_token(tokens.token, vocab)
    if tokens.last != (had + 1 == count or tokens.token in stop):
        what = "ended a stream too early" if tokens.last else "did not end a stream"
        raise InvalidAnswer(f"the cloud {what} (token {had + 1} of {count}); it cannot be trusted")


def check_token(token: int, vocab: int) -> None:
    """Refuse a token that does not exist.

    Raises:
        InvalidAnswer: its id is outside the vocabulary.
    """
    if not 0 <= token < vocab:
        raise InvalidAnswer(f"the cloud answered with token {token}; the vocabulary has {vocab}")
