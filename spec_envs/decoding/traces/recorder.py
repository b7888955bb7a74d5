"""Record what a live decoder drafts at every position of the target's own text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.copying import CopyingDrafter
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.drafters.eagle.drafter import EagleDrafter
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.drafters.lookup import LookupDrafter
from spec_envs.decoding.traces.chain_recorder import chains_everywhere
from spec_envs.decoding.traces.full_trees import grown, on_path
from spec_envs.decoding.traces.tree_recorder import trees_everywhere
from spec_envs.decoding.verifier import LocalVerifier, Verdict

Columns = dict[str, np.ndarray]


class GapVerifier(LocalVerifier):
    """Notes how far the best logit lies above the second, wherever it chooses a token."""

    def _decide(self, tokens: np.ndarray, parents: np.ndarray, hidden: Tensor, *rest: object) -> Verdict:
        best = self.target.head(hidden[-1:])[0].float().topk(2).values
        self.gaps.append(float(best[0] - best[1]))
        return super()._decide(tokens, parents, hidden)

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        """See ``LocalVerifier``."""
        self.gaps: list[float] = []
        return super().start(prompt, rows, rng)


def watched(decoder: Decoder) -> Decoder:
    """The same pair of models, ready to be recorded.

    Raises:
        ValueError: a decoder that does not decode greedily with models in this process, or whose drafter learns.
    """
    if decoder.temperature:
        raise ValueError(f"a trace is of greedy decoding; temperature is {decoder.temperature}, expected 0")
    if decoder.drafter is None or isinstance(getattr(decoder.drafter, "model", decoder.drafter), EarlyExitDrafter):
        raise ValueError(
            "an early exit is not recorded: it learns, and shares the target's cache; take another drafter"
        )
    verifier = GapVerifier(decoder.local.target, decoder.local.capture)
    return Decoder(verifier, decoder.drafter, decoder.clock, decoder.eos, decoder.max_depth, decoder.detokenize)


def kind_of(decoder: Decoder) -> str:
    """``"tree"`` for a drafter of trees, also at width 1, or ``"chain"``."""
    return "tree" if isinstance(decoder.drafter, EagleDrafter) else "chain"


def record(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> Columns:
    """The columns of one text (see ``trace``), of a decoder that is ``watched``."""
    return (record_trees if kind_of(decoder) == "tree" else record_chains)(decoder, prompt, max_new_tokens)


def written(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], Tensor]:
    """The target's own text, and its features at every token in front of the last one."""
    plain = Decoder(decoder.verifier, None, decoder.clock, decoder.eos, 0, decoder.detokenize)
    plain.start(prompt, max_new_tokens, np.random.default_rng(0))
    features = [decoder.verifier.features]
    while not plain.finished:
        plain.verify(0)
        features.append(decoder.verifier.features)
    return plain.tokens, torch.cat(features)


def record_chains(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> Columns:
    """The target writes the text; then chains as long as they go are drafted behind each of its tokens."""
    assert isinstance(decoder.drafter, DraftModelDrafter | CopyingDrafter | LookupDrafter)
    tokens, _ = written(decoder, prompt, max_new_tokens)
    text, n, longest = np.array(tokens), len(tokens), decoder.max_depth + 1
    columns = {
        "tokens": text,
        "gaps": np.array(decoder.verifier.gaps),  # type: ignore[attr-defined]
        "drafted": np.zeros((n, longest), np.int32),
        "log_probs": np.zeros((n, longest), np.float32),
        "entropies": np.zeros((n, longest), np.float32),
        "copied": np.zeros((n, longest), bool),
        "length": np.zeros(n),
        "matched": np.zeros(n),
        "right": np.zeros(n),
    }
    for i, chain in enumerate(chains_everywhere(decoder.drafter, longest, prompt, tokens)):  # none behind the last
        size = chain.tree.size
        columns["drafted"][i, :size] = chain.tree.tokens
        columns["log_probs"][i, :size] = np.diff(chain.tree.scores, prepend=np.float32(0))
        columns["entropies"][i, :size] = [float(e[0]) for e in chain.tree.entropies]
        columns["copied"][i, :size] = chain.copied
        columns["length"][i], columns["matched"][i] = size, chain.matched
        ahead = text[i + 1 : i + 1 + size]
        wrong = np.flatnonzero(chain.tree.tokens[: len(ahead)] != ahead)
        columns["right"][i] = wrong[0] if len(wrong) else len(ahead)
    return columns


def record_trees(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> Columns:
    """The target writes the text; then the full trees of many positions are drafted in one forward per level."""
    assert isinstance(decoder.drafter, EagleDrafter)
    text, features = written(decoder, prompt, max_new_tokens)
    trees = trees_everywhere(decoder.drafter, decoder.max_depth, prompt, text, features)
    width, depth = decoder.tree.width, decoder.max_depth
    drafted = np.zeros((len(text), decoder.tree.capacity), np.int32)
    log_probs = np.zeros(drafted.shape, np.float32)
    entropies = np.zeros((len(text), 1 + width * depth), np.float32)
    for i, levels in enumerate(trees):  # none behind the last token
        drafted[i] = np.concatenate([level.tokens.ravel() for level in levels])
        log_probs[i] = np.concatenate([level.log_probs.ravel() for level in levels])
        entropies[i] = np.concatenate([level.entropies for level in levels])
    path, ranks = on_path(grown(log_probs, width), drafted, np.array(text), width)
    return {
        "tokens": np.array(text),
        "gaps": np.array(decoder.verifier.gaps),  # type: ignore[attr-defined]
        "drafted": drafted,
        "log_probs": log_probs,
        "entropies": entropies,
        "path": path,
        "ranks": ranks,
    }
