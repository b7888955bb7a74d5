"""The verifier over a network gives the same results over every channel, and keeps the real model's distribution."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.sampling import Proposal, probabilities
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer, resolve_dtype
from spec_envs.network import wire
from spec_envs.network.channel import Channel, SimulatedChannel
from spec_envs.network.cloud.engine import Engine
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.link import load_link
from spec_envs.network.proxy import ShapedProxy
from spec_envs.network.websocket import SocketChannel
from tests.support.cloud_process import CloudProcess
from tests.support.models.tiny import CPU, REAL, WORDS
from tests.support.power import draws_for_power

KEY = b"v" * 16


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> Transformer:
    return load_target(str(tiny_target), CPU, "float32")


def simulated(target: Transformer, vocabulary: bytes = KEY, link: str = "constant-5g") -> SimulatedChannel:
    return SimulatedChannel(Engine(target, vocabulary), load_link(link))


def verifier_of(target: Transformer, channel: Channel, vocabulary: bytes = KEY, **sampling: float) -> RemoteVerifier:
    return RemoteVerifier(channel, vocabulary, target.shape.vocab, target.shape.context, **sampling)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_text_is_plain_text_under_random_drafts(target: Transformer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(2, len(WORDS), 9).tolist()
    plain = LocalVerifier(target)
    text = [*prompt, plain.start(prompt, 80, rng)]
    text += plain.decode(79, ())
    verifier = verifier_of(target, simulated(target), temperature=0.0)
    verifier.start(prompt, 80, rng)
    accepted = rejected = 0
    while len(verifier.text) < 70:
        n, at = int(rng.integers(0, 9)), len(verifier.text)
        right = rng.random(n) < 0.8
        tokens = np.where(right, text[at : at + n], rng.integers(0, len(WORDS), n))
        verdict = verifier.verify(tokens, np.arange(n) - 1, np.arange(n))
        accepted, rejected = accepted + len(verdict.path), rejected + n - len(verdict.path)
        assert verifier.text[at:] == [*tokens[verdict.path].tolist(), verdict.token]
        if rng.random() < 0.2:
            verifier.decode(2, ())
    assert verifier.text == text[: len(verifier.text)]
    assert accepted > 10 and rejected > 10


@pytest.fixture(scope="module")
def cloud(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a cloud with the tiny target, in a separate process."""
    arguments = ("--device", "cpu", "--target", str(tiny_target), "--dtype", "float32")
    with CloudProcess(tmp_path_factory.mktemp("cloud"), *arguments) as process:
        yield process.url


def run_session(verifier: RemoteVerifier, seed: int) -> tuple[list[int], list[tuple[int, int]], int]:
    """Return the text, the bytes both ways and the number of accepted tokens of a session with random drafts."""
    sampling, drafts = np.random.default_rng(seed).spawn(2)
    verifier.start([3, 5, 7, 2], 100, sampling)
    sizes, accepted = [], 0
    for i in range(20):
        n = int(drafts.integers(0, 6))
        proposals, tokens = [], []
        for _ in range(n):
            weights = drafts.dirichlet(np.ones(len(WORDS)))
            weights[verifier.text[-1]] += 1  # random models repeat themselves
            proposal = Proposal(np.arange(len(WORDS)), weights)
            if verifier.mode in ("topk", "full"):
                proposal = proposal.truncated(4 if verifier.mode == "topk" else len(WORDS))
            proposals.append(proposal)
            tokens.append(proposal.draw(drafts.random()))
        verdict = verifier.verify(np.array(tokens, np.int64), np.arange(n) - 1, np.arange(n), proposals)
        accepted += len(verdict.path)
        sizes.append((verifier.traffic.bytes_up, verifier.traffic.bytes_down))
        if i % 4 == 3:
            verifier.decode(5, [0])
            sizes.append((verifier.traffic.bytes_up, verifier.traffic.bytes_down))
            verifier.append([4, 6])
    verifier.channel.close()
    return verifier.text, sizes, accepted


@pytest.mark.parametrize("mode", wire.MODES)
def test_same_seed_gives_same_tokens_and_bytes_over_every_channel(
    mode: str, cloud: str, target: Transformer, tiny_target: Path
) -> None:
    vocabulary = wire.vocabulary_hash(load_tokenizer(str(tiny_target)))
    sampling = {"temperature": 0.0} if mode == "ids" else {"temperature": 1.2, "top_p": 0.95}
    texts = []
    for seed in (1, 2):
        outcomes = []
        for channel in (simulated(target, vocabulary), SocketChannel(cloud)):
            verifier = verifier_of(target, channel, vocabulary, **sampling)
            verifier.mode = mode
            outcomes.append(run_session(verifier, seed))
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][2] > 0
        texts.append(outcomes[0][0])
    assert texts[0] != texts[1]


def test_trees_are_refused(target: Transformer, rng: np.random.Generator) -> None:
    verifier = verifier_of(target, simulated(target))
    verifier.start([3], 10, rng)
    siblings = np.array([-1, -1])
    with pytest.raises(ValueError, match="a tree was drafted"):
        verifier.verify(np.array([1, 2]), siblings, np.zeros(2, np.int64), [Proposal.certain(1)] * 2)


@pytest.mark.parametrize("mode", ["ids", "tree", ""])
def test_unsuitable_modes_are_refused(target: Transformer, rng: np.random.Generator, mode: str) -> None:
    verifier = verifier_of(target, simulated(target))
    verifier.mode = mode
    verifier.start([3], 10, rng)
    with pytest.raises(ValueError, match="expected scalar, topk or full at temperature 1"):
        verifier.verify(np.array([1]), np.array([-1]), np.array([0]), [Proposal.certain(1)])


@pytest.mark.parametrize("mode", ["scalar", "topk"])
def test_drafts_without_their_distributions_are_refused(
    target: Transformer, rng: np.random.Generator, mode: str
) -> None:
    verifier = verifier_of(target, simulated(target))
    verifier.mode = mode
    verifier.start([3], 10, rng)
    with pytest.raises(ValueError):
        verifier.verify(np.array([1, 2]), np.array([-1, 0]), np.arange(2), [Proposal.certain(1)])


def test_prompt_longer_than_the_clouds_context_is_refused(target: Transformer, rng: np.random.Generator) -> None:
    verifier = verifier_of(target, SimulatedChannel(Engine(target, KEY, context=8), load_link("constant-5g")))
    with pytest.raises(
        ValueError, match="the prompt has 9 tokens and up to 10 may follow; the cloud takes texts of up to 8"
    ):
        verifier.start([3] * 9, 10, rng)


@pytest.fixture(scope="module")
def real_cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with CloudProcess(tmp_path_factory.mktemp("real"), "--device", "cpu", "--target", REAL) as process:
        yield process.url


@pytest.mark.model
@pytest.mark.parametrize("mode", ["topk", "scalar"])
def test_sampling_over_a_socket_keeps_distribution_of_real_model(mode: str, real_cloud: str) -> None:
    """A χ² test examines the first token that a cycle emits after a few words, with enough draws to detect a bias of
    0.03.

    Each draw is a session with its own seed whose only request comes with the prompt: one token sampled from the target
    itself at a higher temperature. Eight edges ask at the same time, so that they share forwards. An edge that replaces
    the most probable tokens slightly too often is detected with the same number of draws.
    """
    temperature, top_p = 1.0, 0.95
    target, tokenizer = load_target(REAL, CPU, resolve_dtype("auto", CPU, [REAL])), load_tokenizer(REAL)
    prompt, vocabulary = tokenizer("In the")["input_ids"], wire.vocabulary_hash(tokenizer)
    text = torch.tensor([prompt])
    with torch.inference_mode():
        hidden, _ = target.forward(target.embed(text), target.cache(64), torch.arange(len(prompt))[None])
        logits = target.head(hidden[0, -1:])
    warped = TemperatureLogitsWarper(temperature)(text, logits.double())
    p = TopPLogitsWarper(top_p)(text, warped)[0].softmax(-1).numpy()
    proposal = Proposal(np.arange(len(p)), probabilities(logits[0], 1.3))
    if mode == "topk":
        proposal = proposal.truncated(50)

    order = np.argsort(-p)  # tokens in bins of about 1/25 of the mass
    middle = np.cumsum(p[order]) - p[order] / 2
    bins = np.empty(len(p), np.int64)
    bins[order] = np.unique(np.minimum(25 * middle, 24).astype(int), return_inverse=True)[1]
    expected = np.bincount(bins, p)
    draws = draws_for_power(expected, bias=0.03, power=0.95)
    critical = chi2.isf(0.001, len(expected) - 1)

    def edge(first: int) -> list[tuple[int, bool]]:
        """Return every eighth draw, each an emitted token and True if it was the accepted draft."""
        channel, drawn = SocketChannel(real_cloud), []
        verifier = verifier_of(target, channel, vocabulary, temperature=temperature, top_p=top_p)
        verifier.mode = mode
        for draw in range(first, draws, 8):
            rng = np.random.default_rng(draw)
            verifier._begin(prompt, 1, rng)
            token = proposal.draw(rng.random())
            verdict = verifier.verify(np.array([token]), np.array([-1]), np.array([0]), [proposal])
            drawn.append((token, True) if verdict.path else (verdict.token, False))
        channel.close()
        return drawn

    def statistic(tokens: np.ndarray) -> float:
        counts = np.bincount(bins[tokens], minlength=len(expected))
        return float(((counts - draws * expected) ** 2 / (draws * expected)).sum())

    with ThreadPoolExecutor(8) as pool:
        emitted, accepted_drafts = np.array([pair for drawn in pool.map(edge, range(8)) for pair in drawn]).T
    assert len(emitted) == draws and 0.1 < accepted_drafts.mean() < 0.9
    assert (p[emitted] > 0).mean() > 0.999
    assert statistic(emitted) < critical

    # the bias for which the draws are computed: from the largest bin to the second
    most, second = np.argsort(-expected)[:2]
    replaced = (bins[emitted] == most) & (np.random.default_rng(0).random(draws) < 0.03 / expected[most])
    biased = np.where(replaced, np.flatnonzero(bins == second)[0], emitted)
    assert expected[most] > 0.03 and statistic(biased) > critical


def test_estimate_follows_a_real_link(cloud: str, target: Transformer, tiny_target: Path) -> None:
    """The upload time of long messages over a slow connection is not taken for round trip."""
    vocabulary = wire.vocabulary_hash(load_tokenizer(str(tiny_target)))
    port = int(cloud.rpartition(":")[2])
    with ShapedProxy(load_link("constant:up=0.2,down=4,rtt=20"), ("127.0.0.1", port)) as proxy:
        verifier = verifier_of(target, SocketChannel(f"ws://127.0.0.1:{proxy.port}"), vocabulary)
        verifier.mode = "full"
        verifier.start([3], 400, np.random.default_rng(0))
        proposal = Proposal(np.arange(len(WORDS)), np.ones(len(WORDS), np.float16))
        for _ in range(6):
            verifier.verify(np.full(50, 5), np.arange(50) - 1, np.arange(50), [proposal] * 50)
            time.sleep(0.1)
        verifier.channel.close()
    assert verifier.estimate.up_mbps < 0.4  # a busy machine can only make it slower
