from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.tree import ROOT
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.decoding.weights.checkpoints import load_target
from tests.support.models.tiny import CPU
from tests.support.texts import deviation, plain


def random_cycle(decoder: Decoder, rng: np.random.Generator) -> None:
    """Run one cycle of random depth and budget, sometimes a plain step."""
    if rng.random() < 0.1:
        decoder.verify(0)
        return
    decoder.begin()
    for _ in range(rng.integers(0, decoder.max_depth + 1)):
        decoder.expand()
    decoder.verify(int(rng.integers(0, 120)))


@pytest.fixture(params=["tiny_drafter", "tiny_parallel"])
def head(request: pytest.FixtureRequest) -> str:
    """Return the folder of a head of each kind."""
    return str(request.getfixturevalue(request.param))


@pytest.mark.parametrize("seed", range(6))
def test_greedy_text_is_plain_text_under_random_actions(tiny: dict, head: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    decoder = load_decoder(tiny["target"], head, "cpu", "float32")
    prompt = rng.integers(2, 16, int(rng.integers(1, 40))).tolist()
    decoder.start(prompt, 80, rng)
    while not decoder.finished:
        random_cycle(decoder, rng)
    assert decoder.tokens == plain(tiny, prompt, 80)
    if len(decoder.tokens) > 40:
        assert max(c.accepted for c in decoder.cycles) >= 2  # trees are accepted in this test


def test_counts_of_a_cycle_are_consistent(tiny_decoder: Decoder, rng: np.random.Generator) -> None:
    tiny_decoder.start([3, 4, 5], 200, rng)
    tiny_decoder.eos = frozenset()
    tokens = list(tiny_decoder.tokens)
    while not tiny_decoder.finished:
        tiny_decoder.begin()
        tiny_decoder.expand()
        tiny_decoder.expand()
        cycle = tiny_decoder.verify(40)
        tokens += cycle.tokens
        assert cycle.verified == 40 and cycle.drafted == 210 and cycle.depth == 2
        assert cycle.accepted <= 3 and 1 <= cycle.emitted <= cycle.accepted + 1
        parents = [cycle.nodes.parents[node] for node in cycle.nodes.path]
        assert parents == [ROOT, *cycle.nodes.path[:-1]][: len(parents)]
        assert cycle.tokens[: cycle.accepted] == [int(cycle.nodes.tokens[n]) for n in cycle.nodes.path]
    assert tokens == tiny_decoder.tokens
    assert len(tokens) == 200


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 30])
def test_text_is_cut_at_max_new_tokens(tiny_decoder: Decoder, limit: int, rng: np.random.Generator) -> None:
    tiny_decoder.eos = frozenset()
    tiny_decoder.start([5, 6], limit, rng)
    while not tiny_decoder.finished:
        tiny_decoder.cycle(4)
    assert len(tiny_decoder.tokens) == limit


def test_text_is_cut_at_eos(tiny: dict, tiny_decoder: Decoder, rng: np.random.Generator) -> None:
    tiny_decoder.eos = frozenset()
    tiny_decoder.start([5, 6, 9], 60, rng)
    while not tiny_decoder.finished:
        tiny_decoder.cycle(5)
    text = tiny_decoder.tokens
    for stop in set(text[1:]):
        tiny_decoder.eos = frozenset({stop})
        tiny_decoder.start([5, 6, 9], 60, rng)
        while not tiny_decoder.finished:
            tiny_decoder.cycle(5)
        assert tiny_decoder.tokens == text[: text.index(stop) + 1]
        assert tiny_decoder.cycles == [] or tiny_decoder.cycles[-1].accepted <= tiny_decoder.cycles[-1].emitted


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.3), (0.2, 0.99), (1.0, 1e-6)])
def test_temperature_and_top_p_equal_transformers(tiny: dict, temperature: float, top_p: float) -> None:
    target = load_target(tiny["target"], CPU, "float32")
    verifier = LocalVerifier(target, (), temperature, top_p)
    for seed in range(20):
        logits = 3 * torch.randn(500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        warped = TemperatureLogitsWarper(temperature)(None, logits[None])
        if top_p < 1:
            warped = TopPLogitsWarper(top_p)(None, warped)
        assert np.allclose(verifier._probabilities(logits), warped[0].softmax(-1), atol=1e-12)


@pytest.mark.parametrize("width", [1, 3])
def test_sampled_text_has_the_targets_distribution(tiny: dict, head: str, width: int) -> None:
    assert deviation(tiny, head, 0.9, 0.95, width=width, max_depth=4) > 0.001


def test_sampling_is_seeded(tiny: dict, head: str) -> None:
    decoder = load_decoder(tiny["target"], head, "cpu", "float32", temperature=1.0, top_p=0.6)

    def text(seed: int) -> list[int]:
        decoder.start([3, 4], 50, np.random.default_rng(seed))
        while not decoder.finished:
            decoder.cycle(3)
        return decoder.tokens

    assert text(1) == text(1)
    assert len({tuple(text(seed)) for seed in range(5)}) > 1


def test_prompts_that_do_not_fit_are_refused(tiny_decoder: Decoder, rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match=r"prompt has 2040 tokens .* context is 2048: shorten"):
        tiny_decoder.start([3] * 2040, 64, rng)
    with pytest.raises(ValueError, match="prompt is empty"):
        tiny_decoder.start([], 64, rng)


def test_verify_after_the_end_is_refused(tiny_decoder: Decoder, rng: np.random.Generator) -> None:
    tiny_decoder.start([3], 1, rng)
    with pytest.raises(RuntimeError, match="the text has ended"):
        tiny_decoder.verify()


@pytest.mark.parametrize("width", [1, 3, 10])
def test_greedy_text_is_plain_text_at_every_width(tiny: dict, head: str, width: int, rng: np.random.Generator) -> None:
    decoder = load_decoder(tiny["target"], head, "cpu", "float32", width=width)
    decoder.start([3, 9, 4], 60, rng)
    while not decoder.finished:
        decoder.cycle(6)
    assert decoder.tokens == plain(tiny, [3, 9, 4], 60)
