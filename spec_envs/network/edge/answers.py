"""What an edge believes of a cloud: every answer is checked before anything is done with it."""

from __future__ import annotations

from collections.abc import Collection

from spec_envs.network.wire import Refused, Tokens, Verdict, Welcome, unpack_logits

SHOWN = 300  # characters of what a cloud says that are repeated


class Nonsense(ValueError):
    """An answer that no cloud gives that keeps to the protocol."""


def printable(text: str) -> str:
    """Return text as one line that does nothing to a terminal: control characters are blanks, and a long one is cut."""
    clean = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return clean if len(clean) <= SHOWN else f"{clean[:SHOWN]}…"


def check_welcome(welcome: Welcome, vocab: int, tokens: int) -> None:
    """Refuse a greeting of a cloud with another target.

    Args:
        vocab: token ids of the edge's target.
        tokens: of the text so far, of which the cloud cannot have more.

    Raises:
        Nonsense: it has another vocabulary, takes no texts, or has a text that it was not sent.
    """
    if welcome.vocab != vocab:
        raise Nonsense(
            f"the cloud's target has {welcome.vocab} token ids and the edge's {vocab}; give both the same target"
        )
    if welcome.context < 2:
        raise Nonsense(f"the cloud takes texts of {welcome.context} tokens; expected 2 or more")
    if welcome.have > tokens:
        raise Nonsense(f"the cloud has {welcome.have} tokens of a text of {tokens}; its answers cannot be trusted")


def check_verdict(verdict: Verdict, drafted: int, mode: str, vocab: int) -> None:
    """Refuse the verification of another draft.

    Args:
        drafted: tokens of the draft.
        mode: how its distributions were told.

    Raises:
        Nonsense: more tokens were accepted than were drafted, or the token after them does not exist.
    """
    if verdict.accepted > drafted:
        raise Nonsense(f"the cloud accepted {verdict.accepted} tokens of a draft of {drafted}; it cannot be trusted")
    if verdict.token >= 0:
        check_token(verdict.token, vocab)
        return
    if mode != "scalar" or verdict.accepted == drafted:
        raise Nonsense("the cloud's verdict has no token, which it needs here; it cannot be trusted")
    try:
        logits = unpack_logits(verdict.logits, verdict.dtype, vocab)
    except Refused as refused:
        raise Nonsense(f"the cloud's verdict makes no sense: {refused}") from None
    if logits.isnan().any() or logits.max().isinf():
        raise Nonsense("the cloud's verdict has logits that are no numbers; it cannot be trusted")


def check_tokens(tokens: Tokens, had: int, count: int, stop: Collection[int], vocab: int) -> None:
    """Refuse a stream that ends elsewhere than was asked.

    Args:
        had: tokens before this one.
        count, stop: as asked for.

    Raises:
        Nonsense: the token does not exist, or the stream ends too early or not at all.
    """
    check_token(tokens.token, vocab)
    if tokens.last != (had + 1 == count or tokens.token in stop):
        what = "ended a stream too early" if tokens.last else "did not end a stream"
        raise Nonsense(f"the cloud {what} (token {had + 1} of {count}); it cannot be trusted")


def check_token(token: int, vocab: int) -> None:
    """Refuse a token that does not exist.

    Raises:
        Nonsense: it is beyond the vocabulary.
    """
    if not 0 <= token < vocab:
        raise Nonsense(f"the cloud answered with token {token}; the vocabulary has {vocab}")
