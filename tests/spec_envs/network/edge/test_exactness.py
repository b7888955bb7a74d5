"""A cycle over the network emits exactly the target's distribution, by enumeration of all drafts and draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spec_envs.decoding import accept
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.verifier import Traffic
from spec_envs.network import wire
from spec_envs.network.cloud import engine
from spec_envs.network.cloud.engine import Engine, verify_greedy, verify_sampled
from spec_envs.network.edge import remote
from spec_envs.network.edge.remote import RemoteVerifier
from tests.support.enumeration import VOCAB, Branch, Oracle, chained_exactly, random_texts

KEY = b"v" * 16
NOTHING = np.zeros(0, np.int64)
CUTS = {"topk": [1, 2, 3, VOCAB, VOCAB + 4], "full": [VOCAB], "scalar": [None]}
MODES = [(mode, k) for mode, ks in CUTS.items() for k in ks]
Texts = dict[tuple[int, ...], Any]


class EnumeratedChannel:
    """A cloud in which every draw is a fork.

    Messages are encoded as they are sent, requests are read and verified by the engine's own rules, and the logits
    after every text are given. Texts begin with one token that is not counted.
    """

    rtt = 0.0

    def __init__(self, oracle: Oracle, logits: Texts):
        shape, slots = SimpleNamespace(vocab=VOCAB, context=99), SimpleNamespace(lengths=np.zeros(1, np.int64))
        target: Any = SimpleNamespace(shape=shape, slots=lambda sessions, capacity: slots)
        self.engine, self.oracle, self.logits = Engine(target, KEY), oracle, logits

    def begin(self, hello: wire.Hello, rng: Any) -> tuple[wire.Welcome, Traffic]:
        self.session = self.engine.open(wire.expect(wire.decode(wire.encode(hello)), wire.Hello))
        return wire.Welcome(0, 99, VOCAB), Traffic(1, 1)

    def exchange(self, shared: int, request: Callable[[int], wire.Verify]) -> tuple[wire.Verdict, Traffic]:
        frame = wire.encode(request(shared))
        job = self.engine.job(self.session, wire.expect(wire.decode(frame), wire.Verify))
        rows = torch.stack([self.logits[tuple(job.draft[:i].tolist())] for i in range(len(job.draft) + 1)])
        if job.session.hello.temperature == 0:
            answer = verify_greedy(job, rows.argmax(-1).numpy())
        else:
            answer = verify_sampled(job, rows, lambda: Branch(self.oracle))  # type: ignore[arg-type, return-value]
        reply = wire.encode(answer.verdict(1, 0.0, 0.0))
        return wire.expect(wire.decode(reply), wire.Verdict), Traffic(len(frame), len(reply))


def proposal_of(q: np.ndarray) -> Proposal:
    """Return a whole distribution as a proposal, without its zeros."""
    ids = np.flatnonzero(q)
    return Proposal(ids, q[ids])


def cut_to(k: int | None) -> Callable[[Proposal], Proposal]:
    """Return a function that cuts a distribution to the part from which a mode draws."""
    return (lambda whole: whole) if k is None else (lambda whole: whole.truncated(k))


def as_drawn(token: int, drawn_from: Proposal, whole: Proposal) -> Proposal:
    """Return the distribution from which the edge drew the draft, which it sends and uses for residuals."""
    return drawn_from


def emitted(
    mode: str,
    logits: Texts,
    q: Texts,
    length: int,
    cut: Callable[[Proposal], Proposal],
    sent_proposal: Callable[[int, Proposal, Proposal], Proposal] = as_drawn,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> dict[tuple, float]:
    """Return the distribution of a cycle's tokens over the network, over all drafts and all draws of both sides."""
    oracle = Oracle()
    found: dict[tuple, float] = {}
    rng: Any = SimpleNamespace(integers=lambda high: 0, random=lambda: 0.5)

    def draw(weights: np.ndarray, u: Any) -> int:
        if weights.sum() == 0:  # in a branch of probability 0
            return 0
        return oracle.fork(list(weights / weights.sum()))

    with pytest.MonkeyPatch.context() as patch:
        for module in (accept, engine, remote):
            patch.setattr(module, "inverse_cdf", draw)
        for tokens in itertools.product(range(VOCAB), repeat=length):
            whole = [proposal_of(q[tokens[:i]]) for i in range(length)]
            drawn_from = [cut(proposal) for proposal in whole]
            drawn = np.prod([p.probability(token) for p, token in zip(drawn_from, tokens, strict=True)])
            if drawn == 0:
                continue
            proposals_sent = [sent_proposal(*each) for each in zip(tokens, drawn_from, whole, strict=True)]
            draft = np.array(tokens, dtype=np.int64)

            def cycle(draft: np.ndarray = draft, proposals_sent: list[Proposal] = proposals_sent) -> tuple[int, ...]:
                channel: Any = EnumeratedChannel(oracle, logits)
                verifier = RemoteVerifier(channel, KEY, VOCAB, 99, temperature, top_p)
                verifier.mode = mode
                verifier._begin([0], 1, rng)
                verdict = verifier.verify(draft, np.arange(length) - 1, np.arange(length), proposals_sent)
                text = (*draft[verdict.path].tolist(), verdict.token)
                assert verifier.text == [0, *text]
                return text

            for outcome, probability in oracle.walks(cycle):
                found[outcome] = found.get(outcome, 0.0) + drawn * probability
    return found


def targets(p: Texts, dtype: torch.dtype, temperature: float = 1.0, top_p: float = 1.0) -> tuple[Texts, Texts]:
    """Return logits of a float type whose distributions are near ``p``, and the distributions that they sample."""
    with np.errstate(divide="ignore"):
        logits = {text: torch.from_numpy(np.log(row)).to(dtype) for text, row in p.items()}
    exact = {}
    for text, row in logits.items():
        weights = np.exp((row.double().numpy() - row.double().max().item()) / temperature)
        weights /= weights.sum()
        nucleus, mass = np.zeros(VOCAB), 0.0
        for token in np.argsort(-weights, kind="stable"):
            if mass >= top_p:
                break
            nucleus[token] = weights[token]
            mass += weights[token]
        exact[text] = nucleus / nucleus.sum()
    return logits, exact


@pytest.mark.parametrize(("mode", "k"), MODES)
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 3])  # with 3, target and draft have zeros
def test_every_mode_keeps_targets_distribution(mode: str, k: int | None, length: int, seed: int) -> None:
    p, q = random_texts(length, seed)
    logits, exact = targets(p, torch.float64)
    assert all(np.allclose(exact[text], p[text], atol=1e-15) for text in p)
    assert chained_exactly(emitted(mode, logits, q, length, cut_to(k)), length, exact) < 1e-12


@pytest.mark.parametrize(("mode", "k"), [("topk", 2), ("full", VOCAB), ("scalar", None)])
def test_long_drafts_keep_targets_distribution(mode: str, k: int | None) -> None:
    p, q = random_texts(3, 1)
    logits, exact = targets(p, torch.float64)
    assert chained_exactly(emitted(mode, logits, q, 3, cut_to(k)), 3, exact) < 1e-12


@pytest.mark.parametrize(("mode", "k"), [("topk", 1), ("topk", 3), ("full", VOCAB), ("scalar", None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_every_dtype_and_top_p_keeps_targets_distribution(
    mode: str, k: int | None, dtype: torch.dtype, top_p: float
) -> None:
    p, q = random_texts(2, 2)
    p[(0,)] = np.array([0.5, 0.3, 0.0, 0.2, 0.0])
    logits, exact = targets(p, dtype, 0.8, top_p)
    assert any((row == 0).sum() > 2 for row in exact.values()) == (top_p < 1)
    found = emitted(mode, logits, q, 2, cut_to(k), temperature=0.8, top_p=top_p)
    assert chained_exactly(found, 2, exact) < 1e-12


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_greedy_drafts_emit_the_argmax(length: int) -> None:
    p, q = random_texts(length, 0)
    logits, _ = targets(p, torch.float64)
    exact = {text: np.eye(VOCAB)[row.argmax()] for text, row in logits.items()}
    for mode in ("topk", "ids"):  # greedy decoding sends only the ids, whatever the mode
        found = emitted(mode, logits, q, length, cut_to(None), temperature=0.0)
        assert chained_exactly(found, length, exact) < 1e-12


@pytest.mark.parametrize("mode", ["topk", "full", "scalar"])
def test_request_without_draft_samples_from_target(mode: str) -> None:
    p, q = random_texts(0, 0)
    logits, exact = targets(p, torch.float64, 0.8, 0.7)
    found = emitted(mode, logits, q, 0, cut_to(None), temperature=0.8, top_p=0.7)
    assert chained_exactly(found, 0, exact) < 1e-12


@dataclass(frozen=True)
class Mismatched(Proposal):
    """Probabilities of one distribution with the residual of another."""

    residual: Proposal

    def dense(self, vocab: int) -> np.ndarray:
        return self.residual.dense(vocab)


def residual_of_whole(token: int, drawn_from: Proposal, whole: Proposal) -> Proposal:
    return Mismatched(drawn_from.ids, drawn_from.weights, whole)


def residual_of_cut(token: int, drawn_from: Proposal, whole: Proposal) -> Proposal:
    return Mismatched(whole.ids, whole.weights, whole.truncated(2))


def rejected_token_zeroed(token: int, drawn_from: Proposal, whole: Proposal) -> Proposal:
    return Mismatched(drawn_from.ids, drawn_from.weights, Proposal.certain(token))


def whole_sent(token: int, drawn_from: Proposal, whole: Proposal) -> Proposal:
    return whole.truncated(VOCAB)


def rounded_after_drawing(token: int, drawn_from: Proposal, whole: Proposal) -> Proposal:
    return drawn_from.truncated(VOCAB)


@pytest.mark.parametrize(
    ("mode", "k", "sent_proposal", "least"),
    [
        ("scalar", 2, residual_of_whole, 1e-2),  # drawn from the cut distribution
        ("scalar", None, residual_of_cut, 1e-2),  # drawn from the whole distribution
        ("scalar", None, rejected_token_zeroed, 1e-2),
        ("full", None, rounded_after_drawing, 1e-6),  # drawn before it was rounded to float16
        ("topk", 3, whole_sent, 1e-2),  # sent whole, drawn from the cut distribution
    ],
)
def test_enumeration_detects_mismatched_distributions(
    mode: str, k: int | None, sent_proposal: Callable[..., Proposal], least: float
) -> None:
    p, q = random_texts(2, 0)
    logits, exact = targets(p, torch.float64)
    assert chained_exactly(emitted(mode, logits, q, 2, cut_to(k), sent_proposal), 2, exact) > least


def test_unrounded_distribution_is_not_sent() -> None:
    p, q = random_texts(1, 0)
    with pytest.raises(
        ValueError, match="drawn from a distribution that is not float16; set the drafter's top_k first"
    ):
        emitted("full", targets(p, torch.float64)[0], q, 1, cut_to(None))


def test_zeroing_only_the_rejected_token_gives_known_wrong_distribution() -> None:
    p = {(): np.array([0.4, 0.4, 0.2, 0, 0]), **{(x,): np.full(VOCAB, 0.2) for x in range(VOCAB)}}
    logits, _ = targets(p, torch.float64)
    first = np.zeros(VOCAB)
    q = {(): np.array([0.7, 0.05, 0.25, 0, 0])}
    for text, probability in emitted("scalar", logits, q, 1, cut_to(None), rejected_token_zeroed).items():
        first[text[0]] += probability
    assert first[:3] == pytest.approx([0.425, 0.275, 0.30])
