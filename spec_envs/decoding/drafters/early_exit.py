"""Early exit: the first layers of the target draft a chain, the other layers verify it (self-speculation; Kangaroo,
arXiv 2404.18911; DVI, arXiv 2510.05421)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.drafters.children import drawn_child, most_probable_child
from spec_envs.decoding.drafters.vocabulary import Vocabulary
from spec_envs.decoding.exits.adapter import ExitAdapter
from spec_envs.decoding.exits.split import SplitVerifier
from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.rows import Rows
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.tree import Children, Tree


class EarlyExitDrafter(ChainDrafter):
    """Drafts with the verifier's own early exit, over the same cache.

    What the adapter has learned since the last text takes effect when the next text begins.

    Args:
        verifier: the verifier whose target drafts.
        stop: the chain ends after a token to which the exit gave less than this probability (Kangaroo's rule, with
            0.6); 0 never stops.

    Attributes:
        adapter: the exit and its trained parts, for an agent that improves it.

    Raises:
        ValueError: ``stop`` is not a probability.
    """

    def __init__(self, verifier: SplitVerifier, stop: float = 0.0):
        if not 0 <= stop <= 1:
            raise ValueError(f"stop is {stop}; expected a probability from 0 to 1")
        self.verifier, self.adapter, self.stop = verifier, verifier.adapter, stop
        self.target = verifier.target
        self.vocab, self.context = self.target.shape.vocab, self.target.shape.context
        self.temperature, self.sampling = verifier.temperature, (verifier.temperature, verifier.top_p)
        self.capture = verifier.capture
        self.version = -1
        self.projection: Projection | None = None
        self.attention: DeployedAttention | None = None

    def use(self, adapter: ExitAdapter) -> None:
        """Draft and verify with another adapter of the same exit, such as a snapshot, from the next text on."""
        self.adapter = self.verifier.adapter = adapter
        self.version = self.verifier.version = -1

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Begin a new text, as ``Drafter.start`` does; ``features`` are the exit states of the prompt."""
        if self.version != self.adapter.version:
            self.projection, self.version = None, self.adapter.version
            self.attention = DeployedAttention(self.adapter) if self.adapter.kind == "kangaroo" else None
        self.rng, self.text = rng, list(text)
        self.vocabulary: Vocabulary | None = None
        if self.attention:
            self.attention.start(features, len(text) + positions)

    @property
    def lag(self) -> int:
        """One row: the layers that draft share the target's cache, which lacks the last token alone."""
        return 1

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        self.text.extend(tokens)
        if self.attention:
            self.attention.commit(features)
        if self.vocabulary is not None:
            self.vocabulary.add(tokens)

    def continues(self, tree: Tree) -> bool:
        """Return whether the last token was probable enough to draft another one."""
        confidence = np.exp(tree.scores[-1] - (tree.scores[-2] if tree.size > 1 else 0.0))
        return bool(confidence >= self.stop)

    @torch.inference_mode()
    def look(self, chain: list[int]) -> tuple[Tensor, int]:
        states, rows = self.verifier.look(chain)
        return (self.attention.look(states) if self.attention else states[-1:]), rows

    @torch.inference_mode()
    def draft(self, chain: list[int]) -> tuple[Children, int]:
        state, rows = self.look(chain)
        if self.projection is None:
            self.projection = Projection(self.adapter)
        if self.vocabulary is None and self.projection.ids is not None:
            self.vocabulary = Vocabulary(self.projection.ids, self.adapter.rows, self.target)
            self.vocabulary.add(self.text)
        logits = self.projection.head(state)
        extra = None if self.vocabulary is None else self.vocabulary.logits(self.projection.norm(state))
        ids = None if self.vocabulary is None else self.vocabulary.ids
        if self.temperature == 0:
            return most_probable_child(logits, extra, ids, self.target.precision.modules.most_probable), rows
        return drawn_child(logits, extra, ids, self.sampling, self.top_k, self.rng.random()), rows


class Projection:
    """An exit's projection as it is deployed: the adapter is merged into the output rows of its shortlist.

    Attributes:
        ids: target ids of its outputs ``[n]``, or None for all ids.
        head, norm: from hidden states ``[rows, hidden]`` to logits ``[rows, n]``, and the norm before the output rows.
    """

    def __init__(self, adapter: ExitAdapter):
        target, modules = adapter.target, adapter.target.precision.modules
        self.ids = adapter.shortlist
        self.norm = modules.RMSNorm(adapter.norm.detach().to(target.precision.hidden), target.shape.norm_eps)
        ids = torch.from_numpy(self.ids) if self.ids is not None else torch.arange(target.shape.vocab)
        rows = target.precision.cast(adapter.rows(ids.to(target.device)), target.device)
        self.head = modules.Head(rows, self.norm)


class DeployedAttention:
    """Kangaroo's adapter as it is deployed, with keys and values of its own."""

    def __init__(self, adapter: ExitAdapter):
        target: Transformer = adapter.target
        weights = {
            name: target.precision.cast(weight.detach(), target.device)
            for name, weight in adapter.attention.layer().items()
        }
        self.layers, self.target = target.precision.modules.Layers([weights], target.shape), target
        self.shape = dataclasses.replace(target.shape, layers=1)
        self.cache = self._cache(0)

    def start(self, states: Tensor, rows: int) -> None:
        """Read the exit states ``[n, hidden]`` of a new text, which may grow to ``rows``."""
        if rows > self.cache.capacity:
            self.cache = self._cache(max(2048, rows))
        self.cache.length = 0
        self._read(states)
        self.committed = self.cache.length
        self.unread = states[:0]  # committed states that have not been read

    def look(self, states: Tensor) -> Tensor:
        """Return the adapter's output ``[1, hidden]`` for the last of the exit states ``[n, hidden]`` after the
        text."""
        new = torch.cat([self.unread, states])[self.cache.length - self.committed :]
        if len(new):
            self.last = self._read(new)[-1:]
        return self.last

    def commit(self, states: Tensor) -> None:
        """Commit these states; those that have not been read yet are read by the next ``look``."""
        wanted = torch.cat([self.unread, states])
        kept = min(self.cache.length - self.committed, len(wanted))
        self.committed += kept
        self.cache.length, self.unread = self.committed, wanted[kept:]

    def _read(self, states: Tensor) -> Tensor:
        positions = self.cache.length + torch.arange(len(states), device=states.device)[None]
        x: Tensor = self.layers(Rows(states[None], self.cache, self.target.rope, positions))[0]
        self.cache.length += len(states)
        return x[0]

    def _cache(self, rows: int) -> KVCache:
        return KVCache(self.shape, rows, self.target.precision.cache, self.target.device)
