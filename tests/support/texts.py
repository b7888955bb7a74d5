"""Texts of the tiny target, and a test that sampled texts have its distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kstest

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.copying import CopyingDrafter
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.sampling import probabilities
from tests.support.models.tiny import WORDS


def plain_text(decoder: Decoder, prompt: list[int], n: int) -> list[int]:
    """Return the text of up to ``n`` tokens that a decoder emits without drafts."""
    decoder.start(prompt, n, np.random.default_rng(0))
    while not decoder.finished:
        decoder.verify(0)
    return decoder.tokens


def plain(tiny: dict, prompt: list[int], n: int, eos: frozenset[int] | None = None) -> list[int]:
    """Return the greedy text of the tiny target, optionally with other end tokens."""
    decoder = load_decoder(tiny["target"], None, "cpu", "float32")
    decoder.eos = decoder.eos if eos is None else eos
    return plain_text(decoder, prompt, n)


def chain_decoder(tiny: dict, draft: Path | str, **settings: Any) -> Decoder:
    """Return a decoder of the tiny target that drafts chains of up to 8 tokens."""
    return load_decoder(tiny["target"], str(draft), "cpu", "float32", **{"width": 1, "max_depth": 7} | settings)


def deviation(
    tiny: dict,
    draft: Path | str,
    temperature: float,
    top_p: float,
    tokens: int = 2000,
    alternatives: int = 0,
    **settings: int,
) -> float:
    """Return the p-value of a Kolmogorov–Smirnov test that sampled texts have the target's distribution.

    The place of a token in its cumulative distribution, with the tokens that the draft model prefers first, is uniform
    under the target. With a head, the tokens that the target prefers are first.
    """
    decoder = chain_decoder(tiny, draft, temperature=temperature, top_p=top_p, **settings)
    decoder.eos = frozenset()
    drafter = decoder.drafter.model if isinstance(decoder.drafter, CopyingDrafter) else decoder.drafter
    assert drafter is not None
    draft_model = drafter.model if isinstance(drafter, DraftModelDrafter) else None
    rng, places = np.random.default_rng(3), []

    def distributions(model: Transformer, text: torch.Tensor) -> np.ndarray:
        hidden, _ = model.forward(model.embed(text), model.cache(text.shape[1]), torch.arange(text.shape[1])[None])
        return np.stack([probabilities(logits, temperature, top_p) for logits in model.head(hidden)[0]])

    while len(places) < tokens:
        decoder.start(rng.integers(2, len(WORDS), 5).tolist(), 100, rng)
        while not decoder.finished:
            decoder.cycle(int(rng.integers(0, 5)), alternatives, 0.02)
        text = torch.tensor([decoder.prompt + decoder.tokens])
        p = distributions(decoder.local.target, text)
        q = 2 * p if draft_model is None else distributions(draft_model, text)
        for at in range(len(decoder.prompt), text.shape[1]):
            mine, token = p[at - 1], int(text[0, at])
            before = mine[q[at - 1] - mine > (q[at - 1] - mine)[token]].sum()
            places.append(before + rng.random() * mine[token])
            assert mine[token] > 0
    return float(kstest(places, "uniform").pvalue)
