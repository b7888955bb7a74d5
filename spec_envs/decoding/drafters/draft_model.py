"""Draft model: a smaller language model with the target's vocabulary drafts a chain (Leviathan et al. 2023, arXiv
2211.17192).

It is either a whole model, or a few layers between the target's embedding and output rows (`spec-envs drafter --kind
draft-model`). It drafts from a shortlist and from the tokens of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from spec_envs.decoding import catch_up
from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.drafters.children import drawn_child, first_of, most_probable_child
from spec_envs.decoding.drafters.integer_step import IntegerStep
from spec_envs.decoding.drafters.shortlist import Shortlist
from spec_envs.decoding.drafters.vocabulary import Vocabulary
from spec_envs.decoding.model import integers
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.tree import ALTERNATIVES, Children

# Names of the layers' tensors that the forward reads (see ``layers.py``), with the number of the layer.
OF_A_LAYER = re.compile(
    r"model\.layers\.(\d+)\.((self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.(weight|bias)"
    r"|(self_attn\.[qk]_norm|input_layernorm|post_attention_layernorm)\.weight)"
)
SHORTLIST = "shortlist"  # tensor of target ids, in the weights of a model that shares the target's embedding


class DraftModelDrafter(ChainDrafter):
    """Drafts a chain with a language model; each drafted token is read by the next forward.

    Under greedy decoding the chain is the model's own greedy continuation. When sampling, every token is drawn from the
    model's distribution at the target's temperature and top_p, which the tree keeps for the acceptance rule.

    The cache holds the committed text and, after it, the tokens of the chain that have been read. Rolling back only
    sets a length.

    Args:
        model: the draft model.
        target: the model for which it drafts; ids of the draft model beyond the target's are padding, never drafted.
        temperature, top_p: of the target's sampling.
        shortlist: from which it drafts, together with the tokens of the text; None means all ids.
    """

    def __init__(
        self,
        model: Transformer,
        target: Transformer,
        temperature: float = 0.0,
        top_p: float = 1.0,
        shortlist: Shortlist | None = None,
    ):
        self.model, self.target, self.vocab, self.context = model, target, target.shape.vocab, model.shape.context
        self.temperature, self.sampling, self.shortlist = temperature, (temperature, top_p), shortlist
        self.head = model.head if shortlist is None else shortlist.head
        self.vocabulary: Vocabulary | None = None
        self.most_probable = model.precision.modules.most_probable
        self.call: IntegerStep | None = None  # a whole greedy step by the kernels
        if model.precision.modules is integers and temperature == 0:
            head = self.head.linear
            outputs = min(self.vocab, head.outputs)
            self.call = IntegerStep(model.layers, model.norm, head, model.embedding, model.rope, outputs)
        self.cache = model.cache(0)

    @torch.inference_mode()
    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and read the new one except its last token, which the first cycle reads."""
        need = len(text) + positions
        if need > self.cache.capacity:
            self.cache = self.model.cache(max(2048, need))
        self.cache.length, self.rng = 0, rng
        if self.shortlist is not None:
            ids, rows, known = self.shortlist.ids, self.shortlist.rows, self.shortlist.known
            self.vocabulary = Vocabulary(ids, rows, self.target, known)
            self.vocabulary.add(text)
        self._read(text[:-1], np.arange(len(text) - 1))
        self.committed = self.cache.length
        self.chain: list[int] = []  # drafted tokens that have been read
        self.unread = [text[-1]]  # committed tokens that have not been read

    @property
    def lag(self) -> int:
        return len(self.unread)

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Keep the rows of accepted tokens that have been read, and note the other tokens for the next forward."""
        right = 0
        while right < min(len(self.chain), len(tokens)) and self.chain[right] == tokens[right]:
            right += 1
        kept = int(catch_up.kept(len(self.chain), len(tokens), right))
        self.committed += kept
        self.cache.length = self.committed
        self.chain = []
        self.unread.extend(tokens[kept:])

    @torch.inference_mode()
    def draft(self, chain: list[int]) -> tuple[Children, int]:
        """Read the unread tokens of the committed text and of the chain, and draft the next token."""
        if self.vocabulary is not None:
            self.vocabulary.add(self.unread)
        rows = [*self.unread, *chain[len(self.chain) :]]
        children = self.step(rows)
        self.committed += len(self.unread)
        self.unread, self.chain = [], chain
        return children, len(rows)

    @property
    def _columns(self) -> int:
        """Tokens that are proposed after each row."""
        return min(1 + ALTERNATIVES, self.vocab if self.vocabulary is None else len(self.vocabulary.ids))

    def preview(self, tokens: list[int]) -> Children:
        """Draft as if ``tokens`` were the unread ones, to time a forward between cycles; the state stays as it was."""
        kept, self.unread, self.chain = (self.unread, self.committed), tokens, []
        self.cache.length = self.committed
        children, _ = self.draft([])
        self.unread, self.committed = kept
        self.cache.length = self.committed
        return children

    @torch.inference_mode()
    def step(
        self,
        tokens: Sequence[int],
        positions: np.ndarray | None = None,
        last: int = 1,
        seen: np.ndarray | None = None,
    ) -> Children:
        """Make one forward, commit its rows to the cache and draft the next token.

        Args:
            tokens: of the rows ``[n]``.
            positions: rotary positions ``[n]``; by default those after the cache's rows.
            last: after how many rows, counted from the end, a token is drafted; more than one under greedy decoding
                only.
            seen: see ``KVCache.mask``.

        Returns:
            The child of each of the last rows: the most probable token with its alternatives, or one that was drawn.
        """
        n, length = len(tokens), self.cache.length
        if self.call is None:
            at = np.arange(length, length + n) if positions is None else positions
            return self._propose(self._read(tokens, at, last, seen))
        largest = self.model.shape.vocab - 1  # see _read
        ids = [min(token, largest) for token in tokens]
        extra = None if self.vocabulary is None else self.vocabulary.rows
        _, index, log_probs, entropies = self.call(None, ids, positions, self.cache, extra, self._columns, last, seen)
        self.cache.length += n
        return first_of(index if self.vocabulary is None else self.vocabulary.ids[index], log_probs, entropies)

    def _read(self, tokens: Sequence[int], at: np.ndarray, last: int = 1, seen: np.ndarray | None = None) -> Tensor:
        """Append rows for tokens to the cache; return the hidden states of the last ones, ``[last, hidden]``."""
        device = self.model.device
        largest = self.model.shape.vocab - 1  # ids above it are padding of the target's vocabulary
        ids = torch.tensor([list(tokens)], device=device).clamp_(max=largest)
        x = self.model.embed(ids)
        rows = None if seen is None else torch.from_numpy(seen).to(device)
        hidden, _ = self.model.forward(x, self.cache, torch.from_numpy(at).to(device)[None], rows)
        self.cache.length += len(tokens)
        return hidden[0, len(tokens) - last :]

    def _propose(self, hidden: Tensor) -> Children:
        """Draft the token after each of the hidden states ``[n, hidden]``."""
        logits = self.head(hidden)[:, : self.vocab]
        extra = None if self.vocabulary is None else self.vocabulary.logits(self.model.norm(hidden))
        ids = None if self.vocabulary is None else self.vocabulary.ids
        if self.temperature == 0:
            return most_probable_child(logits, extra, ids, self.most_probable, self._columns)
        return drawn_child(logits, extra, ids, self.sampling, self.top_k, self.rng.random())


def on_the_target(
    config: PretrainedConfig, weights: dict[str, Tensor], target: Transformer
) -> tuple[Transformer, Shortlist]:
    """Build a draft model of layers only, between the target's embedding and its output rows of a shortlist.

    Args:
        config: of the layers.
        weights: by Hugging Face's names, without ``model.embed_tokens.weight``, and the ids ``shortlist`` ``[n]``.
        target: the model whose embedding and output rows are shared.

    Returns:
        The model, and the shortlist, whose head is the model's.

    Raises:
        ValueError: the weights belong to another target, nothing reads some of them, or the shortlist is missing or
            wrong.
    """
    if SHORTLIST not in weights:
        raise ValueError(f"the draft model has neither an embedding nor a tensor {SHORTLIST!r}; train it again")
    read = (OF_A_LAYER.fullmatch(name) for name in weights)
    unread = [
        name
        for name, layer in zip(weights, read, strict=True)
        if name not in (SHORTLIST, "model.norm.weight") and not (layer and int(layer[1]) < config.num_hidden_layers)
    ]
    if unread:
        raise ValueError(f"nothing reads the tensors {', '.join(sorted(unread)[:3])}, which may change what it drafts")
    mine, theirs = (config.hidden_size, config.vocab_size), (target.shape.hidden, target.shape.vocab)
    if mine != theirs:
        raise ValueError(
            f"the draft model was made for a target of hidden size and vocabulary {mine}, not {theirs}; use one made "
            "for this target"
        )
    shortlist = weights[SHORTLIST]
    if shortlist.dim() != 1 or shortlist.is_floating_point() or not len(shortlist):
        raise ValueError(f"{SHORTLIST} is {shortlist.dtype} of shape {tuple(shortlist.shape)}; expected a list of ids")
    shortlist = shortlist.long()
    different = len(torch.unique(shortlist))
    if not 0 <= shortlist.min() <= shortlist.max() < target.shape.vocab or different < len(shortlist):
        raise ValueError(
            f"{SHORTLIST} holds ids twice, or others than the target's {target.shape.vocab}; train it again"
        )
    rows = target.output_rows(shortlist.to(target.device))
    config.tie_word_embeddings = False
    own = {name: tensor for name, tensor in weights.items() if name != SHORTLIST}
    own["lm_head.weight"] = rows
    model = Transformer(config, own, target.precision.drafter, target.device, len(shortlist), target.embedding)
    return model, Shortlist(shortlist.numpy(), model.head, target.output_rows, target.shape.vocab)
