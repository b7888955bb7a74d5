"""EAGLE-3 drafter (arXiv 2503.01840): one decoder layer, seldom more, that reads some of the target's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.drafters.heads import HeadDrafter, HeadModel, cast, check_fit
from spec_envs.decoding.drafters.integer_step import Fusion, IntegerStep
from spec_envs.decoding.drafters.vocabulary import Vocabulary
from spec_envs.decoding.model import integers
from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.graphs import graphed
from spec_envs.decoding.model.rope import Rope
from spec_envs.decoding.model.rows import Rows
from spec_envs.decoding.model.shape import Shape, part
from spec_envs.decoding.model.transformer import Transformer, embedded
from spec_envs.decoding.tree import Children, Tree


def captured_layers(layers: int) -> tuple[int, int, int]:
    """Return the three boundaries of a target's layers that a head reads by default: low, middle and high.

    Raises:
        ValueError: the target has too few layers for three different boundaries.
    """
    if layers < 7:
        raise ValueError(f"the target has {layers} layers; an EAGLE-3 head reads three of at least 7")
    return 2, layers // 2, layers - 3


class EagleModel(HeadModel):
    """An EAGLE-3 head in the form for inference, shared by every drafter that uses it.

    Args:
        head: the weights.
        target: the model for which it was trained; its embedding, dtype and device are shared.

    Attributes:
        capture: boundaries of the target's layers whose hidden states the head reads (see ``config.py``).
        mask_hidden: what the unknown positions of a parallel head read in place of the target's states, ``[1, states *
            target hidden]``; empty for other heads.
        mask_token: the token that they read.

    Raises:
        ValueError: the head expects another hidden size, vocabulary or number of layers.
    """

    def __init__(self, head: EagleHead, target: Transformer):
        config, variant = head.config, head.variant
        expected = variant.target_hidden or config.hidden_size
        check_fit(target, expected, config.vocab_size, variant.boundaries, variant.verifier)
        if config.hidden_size != target.shape.hidden and "embed_tokens.weight" not in head.state_dict():
            raise ValueError(
                f"the drafter's hidden size is {config.hidden_size}, the target's is {target.shape.hidden}, so it "
                "needs its own embed_tokens.weight; use a whole head"
            )
        self.variant, self.block = variant, variant.block
        self.capture = variant.boundaries or captured_layers(target.shape.layers)
        device, modules, state = target.device, target.precision.modules, cast(head, target)
        deeper = [part(state, f"layers.{i}.") for i in range(1, config.num_hidden_layers)]
        layers = [part(state, "midlayer."), *deeper]
        shape = Shape(
            hidden=config.hidden_size,
            layers=len(layers),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab=config.draft_vocab_size,
            context=min(target.shape.context, variant.window or target.shape.context),
            norm_eps=config.rms_norm_eps,
        )
        super().__init__(state, shape, head.draft_ids, target, config.tie_word_embeddings)

        def norm(name: str) -> Any:
            return modules.RMSNorm(state[f"{name}.weight"], self.shape.norm_eps)

        self.fc = modules.Linear(state["fc.weight"], state.get("fc.bias"))
        self.fc_norms = [norm(f"fc_norm.{i}") for i in range(variant.states)] if variant.fc_norm else []
        self.joined_norm = norm("input_norm") if variant.norm_before_fc else None
        self.mask_hidden = state.get("mask_hidden", torch.empty(0)).reshape(1, -1)
        self.mask_token = variant.mask_token or 0
        self.layers = graphed(modules.Layers(layers, self.shape), device)
        self.input_norm, self.hidden_norm = norm("midlayer.input_layernorm"), norm("midlayer.hidden_norm")
        self.rope = Rope(config, self.shape.head_dim, self.shape.context, target.precision.hidden, device)
        # A whole step by the kernels, which has the order of norms of the first published heads.
        self.call: IntegerStep | None = None
        passes_normed = variant.norm_output and variant.mask_token is None  # a parallel head passes nothing on
        if modules is integers and not (variant.norm_before_residual or passes_normed):
            norms, outputs = (self.input_norm, self.hidden_norm), self.lm_head.outputs
            fusion = Fusion(self.fc, self.fc_norms, self.joined_norm)
            self.call = IntegerStep(
                self.layers, self.norm, self.lm_head, self.embedding, self.rope, outputs, norms, fusion
            )

    def fuse(self, features: Tensor) -> Tensor:
        """Return the hidden states ``[n, hidden]`` that the head reads.

        Args:
            features: the target's hidden states side by side, ``[n, states * target hidden]``.
        """
        if self.fc_norms:
            chunks = features.chunk(len(self.fc_norms), -1)
            features = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norms, chunks, strict=True)], -1)
        if self.joined_norm:
            features = self.joined_norm(features)
        fused: Tensor = self.fc(features[None])[0]
        return fused

    def step(
        self,
        hidden: Tensor,
        tokens: Sequence[int] | np.ndarray,
        positions: np.ndarray | int | None,
        cache: KVCache,
        vocabulary: Vocabulary,
        width: int,
        last: int,
        seen: np.ndarray | None = None,
        rows: np.ndarray | int | None = None,
        fuses: bool = False,
    ) -> tuple[Tensor, Children]:
        """Make one forward; its rows are written to the cache after the committed ones, which they do not join.

        Args:
            hidden: hidden states ``[m, hidden]`` that the rows read.
            tokens, positions: the token after each row, and the row's rotary position, ``[n]``; one number is that of
                all, None means the positions after the committed ones.
            cache: of this head.
            vocabulary: the tokens that can be drafted.
            width: children per row.
            last: how many rows, counted from the end, get children.
            seen: see ``KVCache.mask``.
            rows: which of the hidden states each row reads, ``[n]``, or one for all; by default they are in the same
                order.
            fuses: True if ``hidden`` are the target's features, to be fused first.

        Returns:
            The hidden states ``[n, hidden]`` that the rows' children read, in memory that is used again after the next
            call with this cache, and the children of the last rows.
        """
        if self.call is not None:
            output, index, log_probs, entropies = self.call(
                hidden, tokens, positions, cache, vocabulary.rows, width, last, seen, rows, fuses
            )
            return output, Children(vocabulary.ids[index], log_probs, entropies)
        device, n = self.target.device, len(tokens)
        with torch.inference_mode():
            hidden = self.fuse(hidden) if fuses else hidden
            hidden = hidden if rows is None else hidden[torch.from_numpy(np.full(n, rows)).to(device)]
            at = np.arange(cache.length, cache.length + n) if positions is None else np.full(n, positions)
            ids, where = torch.as_tensor(tokens, device=device), torch.from_numpy(at).to(device)[None]
            sees = None if seen is None else torch.from_numpy(seen).to(device)
            return self._step(hidden, ids, where, cache, vocabulary, width, last, sees)

    def _step(
        self,
        hidden: Tensor,
        ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        vocabulary: Vocabulary,
        width: int,
        last: int,
        seen: Tensor | None,
    ) -> tuple[Tensor, Children]:
        """Make one forward in torch; see ``step``."""
        variant = self.variant
        read = embedded(ids, self.embedding).to(self.target.precision.hidden)
        normed = self.hidden_norm(hidden)
        entering = torch.cat([self.input_norm(read), normed], -1)[None]
        residual = normed if variant.norm_before_residual else hidden
        output = self.layers(Rows(residual[None], cache, self.rope, positions, seen, entering=entering))[0][0]
        children = self.children(output[len(output) - last :], width, vocabulary)
        return self.norm(output) if variant.norm_output else output, children


class EagleDrafter(HeadDrafter[EagleModel]):
    """Drafts a tree with an EAGLE-3 head.

    Row t of its cache belongs to position t of the text: it reads the target's features of token t and the embedding of
    token t + 1, and predicts token t + 2. Frontier rows follow the committed ones, one block per level.

    Args:
        model: the head.
        width: children per node, and nodes expanded per level.
        max_depth: most expansions after the first level.

    Raises:
        ValueError: ``width`` is larger than the head's vocabulary.
    """

    def __init__(self, model: EagleModel, width: int = 10, max_depth: int = 12):
        super().__init__(model, width, width * max_depth)
        self.own = np.eye(width, dtype=bool)

    def root(self, tree: Tree) -> int:
        """Read the tokens committed since the last call, start the tree from the last row, and return their number."""
        features, tokens = self.unread()
        self.hidden, children = self.catch_up(features, tokens, 1)
        tree.start(children)
        self.rows: np.ndarray | int = len(tokens) - 1  # which outputs the frontier nodes read: those of their parents
        self.lineage = self.own  # which frontier rows each frontier node sees
        return len(tokens)

    def expand(self, tree: Tree) -> int:
        """Grow the tree by one forward over the frontier, after the rows of earlier levels; return its rows."""
        cache, committed, width = self.cache, self.cache.length, self.width
        earlier = self.lineage.shape[1] - width
        position = committed + earlier // width
        cache.length += earlier  # frontier rows of earlier levels, for this forward only
        tokens = tree.tokens[tree.frontier]
        self.hidden, children = self.model.step(
            self.hidden, tokens, position, cache, self.vocabulary, width, width, self.lineage, self.rows
        )
        cache.length = committed
        self.rows = parents = tree.grow(children)
        self.lineage = np.concatenate((self.lineage[parents], self.own), axis=1)
        return width

    def read(self, features: Tensor, tokens: Sequence[int]) -> None:
        """Commit rows for positions of the text to the cache; see ``HeadDrafter.read``."""
        self.catch_up(features, tokens, 0)

    def catch_up(self, features: Tensor, tokens: Sequence[int], last: int) -> tuple[Tensor, Children]:
        """Commit rows for positions of the text to the cache.

        Args:
            features: of the positions, ``[n, states * target hidden]``.
            tokens: the token after each of them, ``[n]``.
            last: how many rows, counted from the end, get children.

        Returns:
            As of ``EagleModel.step``.
        """
        step = self.model.step(features, tokens, None, self.cache, self.vocabulary, self.width, last, fuses=True)
        self.cache.length += len(tokens)
        return step
