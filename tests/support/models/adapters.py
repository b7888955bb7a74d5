"""Early exits with random learned weights, and decoders that draft with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.exits.adapter import ExitAdapter
from spec_envs.decoding.exits.decoder import ExitDecoder
from spec_envs.decoding.exits.split import SplitVerifier
from spec_envs.decoding.model.transformer import Transformer
from tests.support.models.forwards import text_logits
from tests.support.models.tiny import CPU

PROMPTS = ([2, 3, 4, 5, 6], [9, 8, 7], [12, 2, 12, 2, 12])


def random_adapter(target: Transformer, name: str, kind: str, exit_layer: int = 3, seed: int = 0) -> ExitAdapter:
    """Return an adapter whose weights differ from their initial values, as after training."""
    torch.manual_seed(seed)
    adapter = ExitAdapter.fresh(target, name, exit_layer, kind, rank=4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if kind == "layers" else 0.1))
    adapter.shortlist = np.arange(0, target.shape.vocab, 2)
    return adapter


def decoder_of(adapter: ExitAdapter, k: int = 6, temperature: float = 0.0, stop: float = 0.0) -> ExitDecoder:
    """Return a decoder that drafts up to ``k`` tokens with an adapter's exit."""
    verifier = SplitVerifier(adapter, temperature)
    return ExitDecoder(verifier, EarlyExitDrafter(verifier, stop), WallClock(CPU), (), max_depth=k - 1)


def decode_text(decoder: Decoder, prompt: list[int], lengths: list[int], tokens: int = 40) -> list[int]:
    """Return a text whose cycles draft these lengths in turn."""
    decoder.start(prompt, tokens, np.random.default_rng(0))
    for i in range(tokens):
        if decoder.finished:
            break
        decoder.cycle(lengths[i % len(lengths)])
    return decoder.tokens


def logits_of(model: Transformer, ids: list[int], **keywords: Any) -> Tensor:
    """Return logits ``[n, vocab]`` of a text in one forward."""
    return text_logits(model, torch.tensor([ids]), **keywords)[0]
