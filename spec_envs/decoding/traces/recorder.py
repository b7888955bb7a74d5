"""Record what a live decoder drafts at every position of the target's own text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.copying import CopyingDrafter, CopyingTrees, remembers
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.drafters.heads import BlockDrafter, HeadDrafter
from spec_envs.decoding.drafters.lookup import LookupDrafter
from spec_envs.decoding.drafters.suffix import SuffixDrafter
from spec_envs.decoding.traces.chain_recorder import Chain, Chains, chains_everywhere
from spec_envs.decoding.traces.full_trees import grown, level_slice, on_path
from spec_envs.decoding.traces.tree_recorder import Drawn, Trees, trees_everywhere
from spec_envs.decoding.tree import ALTERNATIVES, NEVER
from spec_envs.decoding.verifier import LocalVerifier, Verdict

Columns = dict[str, np.ndarray]


class GapVerifier(LocalVerifier):
    """A verifier that notes how far the best logit lies above the second one wherever it chooses a token.

    Attributes:
        gaps: of each token of the text.
    """

    gaps: list[float]

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        self.gaps = []
        return super().start(prompt, rows, rng)

    def _decide(self, tokens: np.ndarray, parents: np.ndarray, *rest: object) -> Verdict:
        best = self.target.head(self.text.hidden()[-1:])[0].float().topk(2).values
        self.gaps.append(float(best[0] - best[1]))
        return super()._decide(tokens, parents)


def kind_of(decoder: Decoder) -> Literal["tree", "chain"]:
    """Return the kind of a decoder's traces: ``"tree"`` for a head, also at width 1, and for a tree of suffix decoding,
    otherwise ``"chain"``."""
    drafter = decoder.drafter
    in_trees = isinstance(drafter, HeadDrafter | CopyingTrees) or (
        isinstance(drafter, SuffixDrafter) and drafter.width > 1
    )
    return "tree" if in_trees else "chain"


def block_of(decoder: Decoder) -> BlockDrafter[Any] | None:
    """Return the drafter of blocks that a decoder has, if it has one."""
    head = decoder.drafter.head if isinstance(decoder.drafter, CopyingTrees) else decoder.drafter
    return head if isinstance(head, BlockDrafter) else None


class Recorder:
    """Records what a decoder's drafter proposes at every position of the target's own texts.

    Args:
        decoder: its target and drafter are used; a text of its own ends where a text is recorded.

    Raises:
        ValueError: the decoder samples, has no drafter, has an early exit or remembers earlier answers, or its target
            is in another process.
    """

    def __init__(self, decoder: Decoder):
        if decoder.temperature:
            raise ValueError(f"a trace is of greedy decoding; temperature is {decoder.temperature}, expected 0")
        drafter = decoder.drafter
        early = isinstance(drafter, CopyingDrafter) and isinstance(drafter.model, EarlyExitDrafter)
        known = (HeadDrafter, CopyingTrees, DraftModelDrafter, CopyingDrafter, LookupDrafter, SuffixDrafter)
        if early or not isinstance(drafter, known):
            name = "no drafter" if drafter is None else f"a {type(drafter).__name__}"
            raise ValueError(
                f"the decoder has {name}, whose drafts are not recorded; expected one drafter other than an early exit, "
                "which learns and shares the target's cache"
            )
        if remembers(drafter):
            raise ValueError("a trace has drafts that follow from their own text; take suffix without @stream")
        self.drafter, self.kind = drafter, kind_of(decoder)
        self.max_depth, self.width = decoder.max_depth, decoder.tree.width
        self.verifier = GapVerifier(decoder.local.target, decoder.local.capture)
        self.plain = Decoder(self.verifier, None, decoder.clock, decoder.eos, 0, decoder.detokenize)

    def record(self, prompt: Sequence[int], max_new_tokens: int, written: Columns | None = None) -> Columns:
        """Let the target write the text after a prompt, draft at each of its positions, and return the columns of a
        trace (see ``trace``).

        Args:
            prompt: ids of the prompt.
            max_new_tokens: most tokens of the text.
            written: columns of the text with another drafter, which the target then reads and does not write again.
        """
        if written is None:
            tokens, features = self._write(prompt, max_new_tokens)
            gaps = np.array(self.verifier.gaps)
        else:
            tokens, gaps = written["tokens"].tolist(), written["gaps"]
            features = self._read([*prompt, *tokens[:-1]])
        depth = self.max_depth
        if self.kind == "tree":
            trees = trees_everywhere(cast(Trees, self.drafter), depth, prompt, tokens, features)
            columns = tree_columns(trees, tokens, self.width, depth)
        else:
            chains = chains_everywhere(cast(Chains, self.drafter), depth + 1, prompt, tokens)
            columns = chain_columns(chains, tokens, depth + 1)
        return {"tokens": np.array(tokens), "gaps": gaps, **columns}

    def _read(self, text: Sequence[int]) -> Tensor:
        """Return the target's features at every token of a text; nothing is read where the drafter reads none."""
        if not self.verifier.capture:
            return torch.empty(len(text), 0)
        self.verifier.text.begin(len(text))
        return self.verifier.text.append(text, False)

    def _write(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], Tensor]:
        """Return the target's own text, and its features at every token before the last one."""
        self.plain.start(prompt, max_new_tokens, np.random.default_rng(0))
        features = [self.verifier.features]
        while not self.plain.finished:
            self.plain.verify(0)
            features.append(self.verifier.features)
        return self.plain.tokens, torch.cat(features)


def chain_columns(chains: Sequence[Chain], tokens: Sequence[int], longest: int) -> Columns:
    """Return the columns of a text whose chains were drafted after every token but the last, up to ``longest`` each."""
    text, n = np.array(tokens), len(tokens)
    columns = {
        "drafted": np.zeros((n, longest), np.int32),
        "log_probs": np.zeros((n, longest), np.float32),
        "entropies": np.zeros((n, longest), np.float32),
        "copied": np.zeros((n, longest), bool),
        "alternatives": np.zeros((n, longest, ALTERNATIVES), np.int32),
        "alternative_log_probs": np.full((n, longest, ALTERNATIVES), NEVER, np.float32),
        "length": np.zeros(n),
        "matched": np.zeros(n),
        "right": np.zeros(n),
    }
    for i, chain in enumerate(chains):
        size = chain.tree.size
        columns["drafted"][i, :size] = chain.tree.tokens
        columns["log_probs"][i, :size] = np.diff(chain.tree.scores, prepend=np.float32(0))
        columns["entropies"][i, :size] = [float(e[0]) for e in chain.tree.entropies]
        columns["copied"][i, :size] = chain.copied
        beside, _, levels, scores = chain.tree.beside(size, ALTERNATIVES, 0.0)
        places = np.arange(len(levels)) - np.searchsorted(levels, levels)  # among those of the same token
        columns["alternatives"][i, levels, places] = beside
        above = np.concatenate([[np.float32(0)], chain.tree.scores])[levels]
        columns["alternative_log_probs"][i, levels, places] = scores - above
        columns["length"][i], columns["matched"][i] = size, chain.matched
        ahead = text[i + 1 : i + 1 + size]
        wrong = np.flatnonzero(chain.tree.tokens[: len(ahead)] != ahead)
        columns["right"][i] = wrong[0] if len(wrong) else len(ahead)
    return columns


def tree_columns(trees: Sequence[Drawn], tokens: Sequence[int], width: int, depth: int) -> Columns:
    """Return the columns of a text whose trees were drafted after every token but the last."""
    n, capacity = len(tokens), width + width * width * depth
    columns = {
        "drafted": np.zeros((n, capacity), np.int32),
        "log_probs": np.full((n, capacity), NEVER, np.float32),
        "entropies": np.zeros((n, 1 + width * depth), np.float32),
        "copied": np.zeros(n, bool),
        "matched": np.zeros(n),
    }
    for i, tree in enumerate(trees):
        columns["copied"][i], columns["matched"][i] = tree.copied, tree.matched
        for level, children in enumerate(tree.levels):
            rows, most = children.tokens.shape
            slots, first = level_slice(level, width), 1 + width * (level - 1) if level else 0
            columns["drafted"][i, slots].reshape(-1, width)[:rows, :most] = children.tokens
            columns["log_probs"][i, slots].reshape(-1, width)[:rows, :most] = children.log_probs
            columns["entropies"][i, first : first + rows] = children.entropies
    path, ranks = on_path(grown(columns["log_probs"], width), columns["drafted"], np.array(tokens), width)
    return columns | {"path": path, "ranks": ranks}
