"""The drafters that read states of the target: what their models and their trees have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from spec_envs.decoding.drafters.vocabulary import Vocabulary
from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.precision import Precision
from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.model.transformer import Transformer, embedded
from spec_envs.decoding.tree import Children, Tree


class HeadModel:
    """The end of a head in the form for inference, from hidden states to children.

    Args:
        state: tensors of the head: ``norm.weight``, and, where it has them, ``lm_head.weight`` and
            ``embed_tokens.weight``.
        shape: of the head's layers.
        ids: target ids of its draft vocabulary.
        target: the model for which it was trained; its embedding, dtype and device are shared.
        tied: True if the output rows are those of the head's embedding.

    Attributes:
        capture: boundaries of the target's layers whose hidden states the head reads.
        block: how many positions it predicts in one forward; None means any number.
        shortlist: the ids as an array.
        output_rows: where the head's output rows are the target's own, a function that returns those of any ids, so
            that every token can join the shortlist; else None.
    """

    capture: tuple[int, ...]
    block: int | None = None

    def __init__(self, state: dict[str, Tensor], shape: Shape, ids: Tensor, target: Transformer, tied: bool):
        precision, device, modules = target.precision, target.device, target.precision.modules
        self.target, self.shape, self.precision = target, shape, Precision(precision.drafter)
        self.norm = modules.RMSNorm(state["norm.weight"], shape.norm_eps)
        own_embedding = state.get("embed_tokens.weight")
        self.embedding = target.embedding if own_embedding is None else own_embedding.to(self.precision.cache)
        self.most_probable = modules.most_probable
        self.shortlist = ids.numpy()
        ids, rows = ids.to(device), state.get("lm_head.weight")
        output = target.output_rows if shape.hidden == target.shape.hidden else None
        if rows is None:
            rows = precision.cast(embedded(ids, self.embedding) if tied or output is None else output(ids), device)
        self.lm_head = modules.Linear(rows)
        shares = output is not None and torch.allclose(rows, output(ids).to(rows.dtype), rtol=1e-2, atol=1e-3)
        self.output_rows = output if shares else None  # equal up to rounding

    def cache(self, capacity: int) -> KVCache:
        """Return an empty cache for a text of at most ``capacity`` rows."""
        return KVCache(self.shape, capacity, self.precision.cache, self.target.device)

    def children(self, hidden: Tensor, width: int, vocabulary: Vocabulary) -> Children:
        """Return the ``width`` most probable next tokens of each row of hidden states ``[n, hidden]``."""
        normed = self.norm(hidden)
        index, *rest = self.most_probable(self.lm_head(normed), vocabulary.logits(normed), width)
        return Children(vocabulary.ids[index.cpu().numpy()], *(values.cpu().numpy() for values in rest))


def cast(head: nn.Module, target: Transformer) -> dict[str, Tensor]:
    """Return the tensors of a head in the dtype that the target's modules take."""
    weights = head.state_dict().items()
    return {n: target.precision.cast(t, target.device) if t.is_floating_point() else t for n, t in weights}


def check_fit(
    target: Transformer, hidden: int, vocab: int, boundaries: Sequence[int] | None, verifier: str | None
) -> None:
    """Check that a head was made for a target like this one.

    Args:
        target: the model.
        hidden, vocab: hidden size and vocabulary of the head's own target.
        boundaries: of the target's layers that the head reads; None for the default ones.
        verifier: name of the head's own target, if known.

    Raises:
        ValueError: the head expects another hidden size, vocabulary or number of layers.
    """
    shape, of = target.shape, f" (it names {verifier})" if verifier else ""
    for what, mine, theirs in (("hidden size", hidden, shape.hidden), ("vocabulary", vocab, shape.vocab)):
        if mine != theirs:
            raise ValueError(
                f"the drafter's {what} is {mine}, the target's is {theirs}; use a head trained for this target{of}"
            )
    if boundaries and max(boundaries) > shape.layers:
        raise ValueError(
            f"the drafter reads hidden states at the boundaries {list(boundaries)} of a target's layers, but "
            f"the target has {shape.layers}; use a head trained for this target{of}"
        )


Model = TypeVar("Model", bound=HeadModel)


class HeadDrafter(ABC, Generic[Model]):
    """Drafts a tree with a model that reads states of the target.

    Row t of its cache belongs to position t of the text. The last token of a text has no states yet, so its row waits
    for the next cycle.

    Args:
        model: the head.
        width: children per node, and nodes expanded per level.
        beyond: most rows that a cycle writes after those of the text.

    Raises:
        ValueError: ``width`` is larger than the head's vocabulary.
    """

    drafting = ""

    def __init__(self, model: Model, width: int, beyond: int):
        if width > model.shape.vocab:
            raise ValueError(f"width is {width}; the drafter's vocabulary has {model.shape.vocab} tokens only")
        self.model, self.width, self.beyond = model, width, beyond
        self.capture = model.capture
        self.vocab, self.context = model.target.shape.vocab, model.shape.context
        self.device = model.target.device
        self.cache = model.cache(0)
        self.features: list[Tensor] = []
        self.tokens: list[int] = []

    @property
    def lag(self) -> int:
        """Tokens of the text that ``root`` reads before it drafts; see ``Drafter.lag``."""
        return len(self.tokens)

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and read the new one except its last row, which the first cycle completes."""
        need = len(text) + positions + self.beyond
        if need > self.cache.capacity:
            self.cache = self.model.cache(max(2048, need))
        self.cache.length = 0
        self.vocabulary = Vocabulary(self.model.shortlist, self.model.output_rows, self.model.target)
        self.vocabulary.add(text)
        if len(features) > 1:
            self.read(features[:-1], text[1:-1])
        self.features, self.tokens = [features[-1:]], [text[-1]]  # committed, not read yet

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Note committed tokens and their features for the next root."""
        self.features.append(features)
        self.tokens.extend(tokens)

    def unread(self) -> tuple[Tensor, list[int]]:
        """Return the features and tokens that were committed since the last call; the tokens join the vocabulary."""
        features, tokens = self.features, self.tokens
        self.vocabulary.add(tokens)
        self.features, self.tokens = [], []
        return features[0] if len(features) == 1 else torch.cat(features), tokens

    @abstractmethod
    def read(self, features: Tensor, tokens: Sequence[int]) -> None:
        """Commit rows for positions of the text to the cache, without drafting.

        Args:
            features: of the positions, ``[n, states * target hidden]``.
            tokens: the token after each of them, ``[n]``.
        """

    @abstractmethod
    def root(self, tree: Tree) -> int:
        """Start the tree; see ``Drafter.root``."""

    @abstractmethod
    def expand(self, tree: Tree) -> int:
        """Grow the tree; see ``Drafter.expand``."""


class BlockDrafter(HeadDrafter[Model]):
    """Drafts a block of tokens with one forward.

    A position's children do not depend on the tokens before it in the block, so all nodes of a level have the same
    ones, and expanding the tree costs no forward.

    Args:
        model: the head.
        width: children per node, and nodes expanded per level.
        max_depth: most expansions after the first level.

    Attributes:
        block: how many positions a forward predicts: those that the head was trained for, at most ``max_depth`` + 1.
        rows: of a forward, besides those of unread tokens.
        whole: True if they are as many for any ``max_depth``.
    """

    rows: int
    whole = False

    def __init__(self, model: Model, width: int = 10, max_depth: int = 12):
        self.block = min(model.block or max_depth + 1, max_depth + 1)
        super().__init__(model, width, self.block + 1)

    def root(self, tree: Tree) -> int:
        """Draft a block by one forward over the unread tokens and the block; return the number of its rows."""
        features, tokens = self.unread()
        self.children = self.draft(features, tokens)
        self.drafted = 1
        tree.start(at(self.children, 0, 1))
        return len(tokens) + self.rows

    def expand(self, tree: Tree) -> int:
        """Grow the tree by the children of the next position, unless the block ends here; return 0, without a
        forward."""
        if self.drafted < self.block:
            tree.grow(at(self.children, self.drafted, len(tree.frontier)))
            self.drafted += 1
        return 0

    @abstractmethod
    def draft(self, features: Tensor, tokens: list[int]) -> Children:
        """Read tokens of the text and return the children of every position of the block after them.

        Args:
            features: of the target before each token, ``[n, states * target hidden]``.
            tokens: ``[n]``.
        """


def at(children: Children, row: int, nodes: int) -> Children:
    """Return the children of a row for each of so many nodes."""
    tokens, log_probs = (np.repeat(part[row : row + 1], nodes, 0) for part in children[:2])
    return Children(tokens, log_probs, children.entropies[row].repeat(nodes))
