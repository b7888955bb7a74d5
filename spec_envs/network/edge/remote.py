"""A verifier that asks a cloud over a network."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.accept import residual
from spec_envs.decoding.cycle import EMPTY_INTS
from spec_envs.decoding.sampling import Proposal, inverse_cdf, probabilities
from spec_envs.decoding.verifier import Traffic, Verdict
from spec_envs.network import wire
from spec_envs.network.channel import Channel
from spec_envs.network.edge.answers import check_tokens, check_verdict, check_welcome
from spec_envs.network.edge.estimate import Estimate
from spec_envs.network.wire import MODES, VERSION, Hello, Plain, Tokens, Verify, pack_floats, pack_ids, pack_proposal

PLAIN_TOKENS = 24  # tokens of the measurement of plain decoding
FIRST = 2**16  # number of the first request, so large that all numbers have the same encoded length


class RemoteVerifier:
    """Sends chains to a cloud that verifies them.

    Args:
        channel: channel to the cloud.
        vocabulary: hash of the edge's tokenizer.
        vocab, context: number of token ids and context length of the target.
        temperature, top_p: sampling of the target.

    Attributes:
        mode: how the distributions of drafts are sent, one of ``wire.MODES``; greedy decoding always sends ``ids``
            only.
        estimate: rates and round trip of the link.
        traffic: traffic of the last call.
    """

    features = torch.empty(0)
    device = torch.device("cpu")
    dtype = "over a network"  # as tables report it
    chains_only = True

    def __init__(
        self,
        channel: Channel,
        vocabulary: bytes,
        vocab: int,
        context: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ):
        self.channel, self.vocabulary, self.vocab, self.context = channel, vocabulary, vocab, context
        self.temperature, self.top_p = temperature, top_p
        self.mode = "topk"
        self.estimate, self.traffic = Estimate(), Traffic()
        self.number = FIRST

    def plain(self, eos: Collection[int] = ()) -> RemoteVerifier:
        """Return a verifier of the same cloud that streams the target's own text."""
        verifier = StreamingVerifier(
            self.channel.another(), self.vocabulary, self.vocab, self.context, self.temperature, self.top_p
        )
        verifier.eos = eos
        return verifier

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        """Send the prompt and return the first token.

        The cloud's seed is drawn from ``rng``, which also draws from residuals later.
        """
        welcome = self._begin(prompt, rows, rng)
        token = self.verify(EMPTY_INTS, EMPTY_INTS, EMPTY_INTS).token
        self.traffic = total(welcome, self.traffic)
        return token

    def _begin(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> Traffic:
        self.text, self.shared, self.rng = [int(token) for token in prompt], 0, rng
        self.estimate = Estimate()  # no state survives a text
        seed = int(rng.integers(2**63 - 1))
        hello = Hello(VERSION, self.vocabulary, secrets.token_bytes(16), self.temperature, self.top_p, seed)
        welcome, traffic = self.channel.begin(hello, rng)
        check_welcome(welcome, self.vocab, 0)
        if len(prompt) + rows > welcome.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and up to {rows} may follow; the cloud takes texts of up to "
                f"{welcome.context}: shorten the prompt or lower max_new_tokens"
            )
        self.estimate.ping(self.channel.rtt)
        return traffic

    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        """Have the cloud verify a chain ``[n]`` that was drawn from ``proposals``.

        Raises:
            ValueError: the nodes are not a chain, the mode does not send enough, or the answer is invalid.
            CloudUnavailable: the cloud does not answer.
        """
        if not np.array_equal(parents, np.arange(len(tokens)) - 1):
            raise ValueError("a tree was drafted, but over a network chains are verified; take a drafter of chains")
        if self.temperature and not proposals:  # the drafter is certain of its tokens
            proposals = [Proposal.certain(token) for token in tokens.tolist()]
        mode = self.mode if len(tokens) and self.temperature else "ids"
        if mode not in MODES or (mode == "ids" and self.temperature and len(tokens)):
            raise ValueError(f"mode is {self.mode!r}; expected scalar, topk or full at temperature {self.temperature}")
        probabilities, sent = b"", []
        if mode == "scalar":
            probabilities = pack_floats([q.probability(x) for q, x in zip(proposals, tokens.tolist(), strict=True)])
        elif mode != "ids":
            sent = [pack_proposal(proposal, self.vocab) for proposal in proposals]
        draft = pack_ids(tokens, self.vocab)

        def request(at: int) -> Verify:
            self.number += 1
            return Verify(self.number, at, pack_ids(self.text[at:], self.vocab), draft, mode, probabilities, sent)

        verdict, self.traffic = self.channel.exchange(self.shared, request)
        check_verdict(verdict, len(tokens), mode, self.vocab)
        self._update_estimate(self.traffic)
        accepted = verdict.accepted
        self.text += tokens[:accepted].tolist()
        self.shared = len(self.text)
        token = verdict.token
        if token < 0:
            logits = wire.unpack_logits(verdict.logits, verdict.dtype, self.vocab)
            token = drawn_from_residual(logits, proposals[accepted], self.temperature, self.top_p, self.rng.random())
        else:
            self.shared += 1
        self.text.append(token)
        return Verdict(list(range(accepted)), token)

    def decode(self, count: int, eos: Collection[int]) -> list[int]:
        """Return the target's own next tokens, up to ``count`` or the first of ``eos``, from one request."""
        self.traffic, tokens = Traffic(), []
        for answer, traffic in self._stream(count, eos):
            tokens.append(answer.token)
            self.traffic = total(self.traffic, traffic)
        self.text += tokens
        self.shared = len(self.text)
        self.estimate.ping(self.channel.rtt)
        return tokens

    def append(self, tokens: Sequence[int]) -> None:
        """Append tokens that the target did not choose; they are sent with the next request.

        A simulated link moves to its next state meanwhile.
        """
        self.channel.idle()
        self.text += [int(token) for token in tokens]

    def close(self) -> None:
        """End the session; may be called twice."""
        self.channel.close()

    def plain_seconds(self) -> float:
        """Return the median seconds of a plain decoding step, as the cloud reports them."""
        try:
            self._begin([0] * 64, PLAIN_TOKENS, np.random.default_rng(0))
            answers = [answer for answer, _ in self._stream(PLAIN_TOKENS, ())]
        finally:
            self.channel.close()
        return float(np.median([answer.seconds for answer in answers[1:]]))

    def _stream(self, count: int, eos: Collection[int]) -> Iterator[tuple[Tokens, Traffic]]:
        stop = pack_ids(sorted(eos), self.vocab)

        def request(at: int) -> Plain:
            self.number += 1
            return Plain(self.number, at, pack_ids(self.text[at:], self.vocab), count, stop)

        for had, (answer, traffic) in enumerate(self.channel.stream(self.shared, request)):
            check_tokens(answer, had, count, eos, self.vocab)
            yield answer, traffic

    def _update_estimate(self, traffic: Traffic) -> None:
        self.estimate.ping(self.channel.rtt)
        self.estimate.exchange(traffic.bytes_up, traffic.bytes_down, traffic.seconds)


class StreamingVerifier(RemoteVerifier):
    """Streams plain decoding by the cloud: after one request, the cloud sends every token in a message of its own."""

    eos: Collection[int] = ()

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        welcome = self._begin(prompt, rows, rng)
        self.stream = self._stream(rows - 1, self.eos)
        token = self.verify(EMPTY_INTS, EMPTY_INTS, EMPTY_INTS).token
        self.traffic = total(welcome, self.traffic)
        return token

    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        """Return the next token of the stream."""
        answer, self.traffic = next(self.stream)
        return Verdict([], answer.token)


def drawn_from_residual(logits: Tensor, proposal: Proposal, temperature: float, top_p: float, u: float) -> int:
    """Return the token after a rejection, drawn at the edge from the residual of the two distributions (DSSD, arXiv
    2507.12000)."""
    p = probabilities(logits, temperature, top_p)
    return inverse_cdf(residual(p, proposal.dense(len(p))), u)


def total(a: Traffic, b: Traffic) -> Traffic:
    """Return the sum of the traffic of two calls."""
    return Traffic(
        a.bytes_up + b.bytes_up, a.bytes_down + b.bytes_down, a.seconds + b.seconds, a.simulated or b.simulated
    )
