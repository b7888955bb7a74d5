"""Record what a live decoder drafts at every position of the target's own text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import Copier
from spec_envs.decoding.drafters.eagle import EagleDrafter
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.trace import grown, on_path
from spec_envs.decoding.tree import Children, Tree
from spec_envs.decoding.verifier import LocalVerifier, Verdict

TOGETHER = 16  # positions whose trees are drafted in one forward
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


def record_chains(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> Columns:
    """At every token the drafter drafts as far as it goes, and nothing of it is taken."""
    decoder.start(prompt, max_new_tokens, np.random.default_rng(0))
    longest, drafter = decoder.max_depth + 1, decoder.drafter
    rows: list[tuple[list[int], np.ndarray, list[float], list[bool], int]] = []
    while not decoder.finished:
        matched, copied = drafter.matched() if isinstance(drafter, Copier) else 0, []
        while decoder.tree.size < longest:
            before = decoder.tree.size
            chain = decoder.tree.tokens.tolist()
            copied.append(isinstance(drafter, Copier) and drafter.source(chain) is not None)
            if not decoder.drafting:
                decoder.begin()
            elif before:
                decoder.expand()
            if decoder.tree.size == before:
                break
        tree = decoder.tree
        entropies = [float(e[0]) for e in tree.entropies]
        rows.append((tree.tokens.tolist(), tree.scores.copy(), entropies, copied[: tree.size], matched))
        decoder.verify(0)
    n, text = len(decoder.tokens), np.array(decoder.tokens)
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
    for i, (tokens, scores, entropies, copied, matched) in enumerate(rows):
        size = len(tokens)
        columns["drafted"][i, :size] = tokens
        columns["log_probs"][i, :size] = np.diff(scores, prepend=np.float32(0))
        columns["entropies"][i, :size] = entropies
        columns["copied"][i, :size] = copied
        columns["length"][i], columns["matched"][i] = size, matched
        ahead = text[i + 1 : i + 1 + size]
        wrong = np.flatnonzero(np.array(tokens[: len(ahead)]) != ahead)
        columns["right"][i] = wrong[0] if len(wrong) else len(ahead)
    return columns


def record_trees(decoder: Decoder, prompt: Sequence[int], max_new_tokens: int) -> Columns:
    """The target writes the text; then the full trees of many positions are drafted in one forward per level."""
    plain = Decoder(decoder.verifier, None, decoder.clock, decoder.eos, 0, decoder.detokenize)
    plain.start(prompt, max_new_tokens, np.random.default_rng(0))
    features = [decoder.verifier.features]
    while not plain.finished:
        plain.verify(0)
        features.append(decoder.verifier.features)
    text = plain.tokens
    trees = draft_everywhere(decoder, prompt, text, torch.cat(features)) if len(text) > 1 else []
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


@torch.inference_mode()
def draft_everywhere(
    decoder: Decoder, prompt: Sequence[int], text: Sequence[int], features: Tensor
) -> list[list[Children]]:
    """What an EAGLE head drafts behind every token of a text but the last: the children of each level.

    A forward takes as many positions as have the same vocabulary, which grows with the text: a tree must not know a
    token that only a later position has seen.

    Args:
        text: emitted tokens ``[n]``.
        features: of the target, at every token in front of the last one, ``[prompt + n - 1, …]``.
    """
    assert isinstance(decoder.drafter, EagleDrafter)
    width, depth, model = decoder.drafter.width, decoder.max_depth, decoder.drafter.model
    drafter = EagleDrafter(model, width, TOGETHER * (depth + 1))
    drafter.start([*prompt, text[0]], len(text) + TOGETHER, features[: len(prompt)], np.random.default_rng(0))
    found: list[list[Children]] = []
    at, end = 0, len(text) - 1
    while at < end:
        drafter.vocabulary.add(text[at : at + 1])
        stop = at + 1
        while stop < min(end, at + TOGETHER) and not brings_new(drafter, text[stop]):
            stop += 1
        rows = slice(len(prompt) - 1 + at, len(prompt) - 1 + stop)
        found += draft_together(drafter, features[rows], text[at:stop], depth)
        at = stop
    return found


def brings_new(drafter: EagleDrafter, token: int) -> bool:
    """Whether the vocabulary would grow by a token."""
    return drafter.vocabulary.output_rows is not None and not drafter.vocabulary.known[token]


def draft_together(drafter: EagleDrafter, features: Tensor, tokens: Sequence[int], depth: int) -> list[list[Children]]:
    """Trees behind each of ``tokens`` ``[m]``, the next ones of the text; their rows stay in the drafter's cache."""
    model, cache, width, m = drafter.model, drafter.cache, drafter.width, len(tokens)
    hidden, roots = drafter.catch_up(features, tokens, m)
    committed, rows = cache.length, m * width
    trees = [Tree(width, depth) for _ in tokens]
    levels = [[row(roots, i, 1)] for i in range(m)]
    for tree, first in zip(trees, levels, strict=True):
        tree.start(first[0])
    entering = hidden.repeat_interleave(width, 0)
    lineages = [np.eye(width, dtype=bool) for _ in tokens]  # which rows of its own each frontier node sees
    prefix = np.repeat(np.tril(np.ones((m, m), dtype=bool)), width, 0)
    base = np.repeat(committed - m + 1 + np.arange(m), width)
    for level in range(depth):
        seen = np.zeros((rows, m + (level + 1) * rows), dtype=bool)
        seen[:, :m] = prefix
        for i, lineage in enumerate(lineages):
            for earlier in range(level + 1):
                start = m + earlier * rows + i * width
                own = lineage[:, earlier * width : (earlier + 1) * width]
                seen[i * width : (i + 1) * width, start : start + width] = own
        frontier = np.concatenate([tree.tokens[tree.frontier] for tree in trees])
        cache.length = committed + level * rows
        output, children = model.step(entering, frontier, base + level, cache, drafter.vocabulary, width, rows, seen)
        cache.length = committed
        kept = []
        for i, tree in enumerate(trees):
            own_children = row(children, i, width)
            levels[i].append(own_children)
            parents = tree.grow(own_children)
            kept.append(i * width + parents)
            lineages[i] = np.concatenate([lineages[i][parents], np.eye(width, dtype=bool)], axis=1)
        entering = output[torch.from_numpy(np.concatenate(kept)).to(output.device)]
    return levels


def row(children: Children, i: int, count: int) -> Children:
    """The children of rows ``i * count`` to ``(i + 1) * count``."""
    own = slice(i * count, (i + 1) * count)
    return Children(children.tokens[own], children.log_probs[own], children.entropies[own])
