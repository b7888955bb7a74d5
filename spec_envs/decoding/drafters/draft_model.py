"""Draft model: a smaller language model of the target's vocabulary, which drafts a chain of tokens (Leviathan et al.
2023, arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.accept import inverse_cdf
from spec_envs.decoding.sampling import probabilities
from spec_envs.decoding.transformer import Transformer
from spec_envs.decoding.tree import Tree


class DraftModelDrafter:
    """Drafts a chain, each token read by the next forward.

    Under greedy decoding the chain is the model's own most probable text. When sampling, every token is drawn from the
    model's distribution at the target's temperature and top_p, which the tree keeps for the acceptance rule.

    Its cache holds the committed text, and behind it the chain's tokens that have been read. Rolling back is setting a
    length.

    Args:
        model: the draft model.
        vocab: ids of the target; what the model has beyond them is padding and is never drafted.
        temperature, top_p: of the target.
    """

    capture: tuple[int, ...] = ()
    width = 1

    def __init__(self, model: Transformer, vocab: int, temperature: float = 0.0, top_p: float = 1.0):
        self.model, self.vocab, self.context = model, vocab, model.shape.context
        self.temperature, self.top_p = temperature, top_p
        self.most_probable = model.precision.modules.most_probable
        self.cache = model.cache(0)

    @torch.inference_mode()
    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Forget the last text and read this one but for its last token, which the first cycle reads."""
        need = len(text) + positions
        if need > self.cache.capacity:
            self.cache = self.model.cache(max(2048, need))
        self.cache.length, self.rng = 0, rng
        self._read(text[:-1])
        self.committed = self.cache.length
        self.chain: list[int] = []  # drafted tokens that have been read
        self.unread = [text[-1]]  # committed ones that have not

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Keep the rows of what the target kept of the chain, and note the rest for the next root."""
        accepted, kept = tokens[:-1], 0  # the last one is the target's own
        while kept < min(len(self.chain), len(accepted)) and self.chain[kept] == accepted[kept]:
            kept += 1
        self.committed += kept
        self.cache.length = self.committed
        self.chain = []
        self.unread.extend(tokens[kept:])

    @torch.inference_mode()
    def root(self, tree: Tree) -> None:
        """Read what was committed since the last call, and draft the first token."""
        hidden = self._read(self.unread)
        self.committed, self.unread = self.cache.length, []
        tree.start(*self._propose(hidden))

    @torch.inference_mode()
    def expand(self, tree: Tree) -> None:
        """Read the chain's last token and draft the next one."""
        last = int(tree.tokens[-1])
        hidden = self._read([last])
        self.chain.append(last)
        tokens, log_probs, proposal = self._propose(hidden)
        tree.grow(tokens[None], log_probs[None], proposal)

    def _read(self, tokens: Sequence[int]) -> Tensor:
        """Append rows for tokens; the hidden state of the last one, ``[1, hidden]``."""
        device, length = self.model.device, self.cache.length
        ids = torch.tensor([list(tokens)], device=device).clamp_(
            max=self.model.shape.vocab - 1
        )  # padding of the target's
        x = self.model.embed(ids)
        positions = torch.arange(length, length + len(tokens), device=device)[None]
        hidden, _ = self.model.forward(x, self.cache, positions)
        self.cache.length += len(tokens)
        return hidden[0, -1:]

    def _propose(self, hidden: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The next token ``[1]``, its log-probability ``[1]``, and what it was drawn from."""
        logits = self.model.head(hidden)[:, : self.vocab]
        if self.temperature == 0:
            index, log_probability = self.most_probable(logits, None, 1)
            return index[0].cpu().numpy(), log_probability[0].cpu().numpy(), None
        q = np.zeros(self.vocab)
        q[: logits.shape[1]] = probabilities(logits[0], self.temperature, self.top_p)
        token = inverse_cdf(q, self.rng.random())
        return np.array([token]), np.log(q[[token]]), q
