"""A verifier whose target is behind a network."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.accept import residual
from spec_envs.decoding.cycle import NO_TOKENS
from spec_envs.decoding.sampling import Proposal, inverse_cdf, probabilities
from spec_envs.decoding.verifier import Traffic, Verdict
from spec_envs.network import wire
from spec_envs.network.channel import Channel
from spec_envs.network.edge.answers import check_tokens, check_verdict, check_welcome
from spec_envs.network.edge.estimate import Estimate
from spec_envs.network.wire import MODES, VERSION, Hello, Plain, Tokens, Verify, pack_floats, pack_ids, pack_proposal

PLAIN_TOKENS = 24  # of the measurement of plain decoding
FIRST = 2**16  # number of the first request: all that follow are as many bytes long


class RemoteVerifier:
    """Sends chains to a cloud that judges them.

    Args:
        channel: to the cloud.
        vocabulary, vocab: hash of the edge's tokenizer, and ids of the target.
        temperature, top_p: of the target's sampling.

    Attributes:
        mode: how the drafts' distributions are told, one of ``wire.MODES``; greedy decoding tells ``ids`` alone.
        estimate: what is known of the link.
        traffic: of the last call.
    """

    features = torch.empty(0)
    device = torch.device("cpu")
    dtype = "behind a network"

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
        """The cloud alone, which streams the target's own text."""
        verifier = CloudOnly(
            self.channel.another(), self.vocabulary, self.vocab, self.context, self.temperature, self.top_p
        )
        verifier.eos = eos
        return verifier

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        """Send the prompt; the first token. The cloud's seed is drawn from ``rng``, which draws residuals, too."""
        welcome = self._begin(prompt, rows, rng)
        token = self.verify(NO_TOKENS, NO_TOKENS, NO_TOKENS).token
        self.traffic = added(welcome, self.traffic)
        return token

    def _begin(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> Traffic:
        self.text, self.shared, self.rng = [int(token) for token in prompt], 0, rng
        self.estimate = Estimate()  # nothing of a text outlives it
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
        """Have a chain ``[n]`` judged; ``proposals`` are what it was drawn from.

        Raises:
            ValueError: a tree, a mode that does not tell enough, or an answer that makes no sense.
            CloudAway: the cloud does not answer.
        """
        if not np.array_equal(parents, np.arange(len(tokens)) - 1):
            raise ValueError("a tree was drafted; behind a network chains are verified: take a drafter of chains")
        if self.temperature and not proposals:  # of a drafter that is certain of what it says
            proposals = [Proposal.certain(token) for token in tokens.tolist()]
        mode = self.mode if len(tokens) and self.temperature else "ids"
        if mode not in MODES or (mode == "ids" and self.temperature and len(tokens)):
            raise ValueError(f"mode is {self.mode!r}; expected scalar, topk or full at temperature {self.temperature}")
        chances, sent = b"", []
        if mode == "scalar":
            chances = pack_floats([q.probability(x) for q, x in zip(proposals, tokens.tolist(), strict=True)])
        elif mode != "ids":
            sent = [pack_proposal(proposal, self.vocab) for proposal in proposals]
        draft = pack_ids(tokens, self.vocab)

        def request(at: int) -> Verify:
            self.number += 1
            return Verify(self.number, at, pack_ids(self.text[at:], self.vocab), draft, mode, chances, sent)

        verdict, self.traffic = self.channel.exchange(self.shared, request)
        check_verdict(verdict, len(tokens), mode, self.vocab)
        self._learn_link(self.traffic)
        accepted = verdict.accepted
        self.text += tokens[:accepted].tolist()
        self.shared = len(self.text)
        token = verdict.token
        if token < 0:
            logits = wire.unpack_logits(verdict.logits, verdict.dtype, self.vocab)
            token = redrawn(logits, proposals[accepted], self.temperature, self.top_p, self.rng.random())
        else:
            self.shared += 1
        self.text.append(token)
        return Verdict(list(range(accepted)), token)

    def decode(self, count: int, eos: Collection[int]) -> list[int]:
        """The target's own next tokens, up to ``count`` or the first of ``eos``, in one exchange."""
        self.traffic, tokens = Traffic(), []
        for answer, traffic in self._stream(count, eos):
            tokens.append(answer.token)
            self.traffic = added(self.traffic, traffic)
        self.text += tokens
        self.shared = len(self.text)
        self.estimate.ping(self.channel.rtt)
        return tokens

    def append(self, tokens: Sequence[int]) -> None:
        """Take tokens into the text that the target did not choose; they go up with the next request. A simulated link
        moves on meanwhile."""
        self.channel.idle()
        self.text += [int(token) for token in tokens]

    def close(self) -> None:
        """End the session; may be called twice."""
        self.channel.close()

    def plain_seconds(self) -> float:
        """The cloud's own seconds of a plain step, as it reports them."""
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

    def _learn_link(self, traffic: Traffic) -> None:
        self.estimate.ping(self.channel.rtt)
        self.estimate.exchange(traffic.bytes_up, traffic.bytes_down, traffic.seconds)


class CloudOnly(RemoteVerifier):
    """Plain decoding by the cloud, streamed: after the prompt every token is a message of its own, which nobody asks for."""

    eos: Collection[int] = ()

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        welcome = self._begin(prompt, rows, rng)
        self.stream = self._stream(rows - 1, self.eos)
        token = self.verify(NO_TOKENS, NO_TOKENS, NO_TOKENS).token
        self.traffic = added(welcome, self.traffic)
        return token

    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        """The next token of the stream."""
        answer, self.traffic = next(self.stream)
        return Verdict([], answer.token)


def redrawn(logits: Tensor, proposal: Proposal, temperature: float, top_p: float, u: float) -> int:
    """The token behind a rejection, drawn at the edge from what the target's distribution has over the draft's (DSSD,
    arXiv 2507.12000)."""
    p = probabilities(logits, temperature, top_p)
    return inverse_cdf(residual(p, proposal.dense(len(p))), u)


def added(a: Traffic, b: Traffic) -> Traffic:
    """Of two calls together."""
    return Traffic(
        a.bytes_up + b.bytes_up, a.bytes_down + b.bytes_down, a.seconds + b.seconds, a.simulated or b.simulated
    )
