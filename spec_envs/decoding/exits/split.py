"""A target read in two parts: the layers before its early exit draft a chain, those after it verify."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding import accept
from spec_envs.decoding.exits.adapter import ExitAdapter
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.verifier import LocalVerifier, Verdict


class SplitVerifier(LocalVerifier):
    """Verifies with the layers after the target's own early exit.

    No layer reads a row twice: the exit states that the drafter has computed are kept, and verification continues from
    them in the same cache.

    Args:
        adapter: the exit, with its trained parts.
        temperature, top_p: see ``LocalVerifier``.

    Attributes:
        features: exit states of the rows that the last call committed, ``[rows, hidden]``.
        finals: hidden states of the rows that the last ``verify`` committed after the last layer, ``[rows, hidden]``.
        logits: of every row of the last ``verify``, ``[n + 1, vocab]``.
    """

    def __init__(self, adapter: ExitAdapter, temperature: float = 0.0, top_p: float = 1.0):
        super().__init__(adapter.target, (adapter.exit_layer,), temperature, top_p)
        self.adapter, self.version = adapter, -1
        layers = self.target.shape.layers
        self.shallow, self.deep = range(adapter.exit_layer), range(adapter.exit_layer, layers)
        shape, dtype = (64, self.target.shape.hidden), self.target.precision.hidden
        self.states = torch.empty(shape, dtype=dtype, device=self.device)  # exit states of
        self.rows: list[int] = []  # these tokens after the committed ones

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        """Read the prompt and return the first token; what the adapter has learned takes effect from now on."""
        if self.version != self.adapter.version:
            added, self.version = self.adapter.deployed_additions(), self.adapter.version
            before = self.text.added
            self.text.added = added if added is None or before is None else before.become(added)
        self.rows = []
        return super().start(prompt, rows, rng)

    def plain(self, eos: Collection[int] = ()) -> LocalVerifier:
        """Return a verifier that never drafts; an adapter in the target's layers stays in effect."""
        other = LocalVerifier(self.target, (), self.temperature, self.top_p)
        other.text.added = self.adapter.deployed_additions()
        return other

    @torch.inference_mode()
    def look(self, chain: Sequence[int]) -> tuple[Tensor, int]:
        """Return exit states of the text's last token and of ``chain``, ``[1 + len(chain), hidden]``, and how many of
        these rows had to be computed."""
        wanted = [self.last, *chain]
        known = 0
        while known < min(len(wanted), len(self.rows)) and wanted[known] == self.rows[known]:
            known += 1
        if new := wanted[known:]:
            committed = self.cache.length
            self.cache.length += known
            ids = torch.tensor([new], device=self.device)
            positions = self.cache.length + torch.arange(len(new), device=self.device)[None]
            try:
                x, _ = self.target.forward(
                    self.target.embed(ids), self.cache, positions, layers=self.shallow, added=self.text.added
                )
            finally:
                self.cache.length = committed
            if len(wanted) > len(self.states):
                self.states = torch.cat([self.states, torch.empty_like(self.states), x[0]])
            self.states[known : len(wanted)] = x[0]
            self.rows = wanted
        return self.states[: len(wanted)], len(new)

    @torch.inference_mode()
    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        """Verify a chain; see ``Verifier.verify``."""
        states, _ = self.look(tokens.tolist())
        positions = self.cache.length + torch.arange(len(states), device=self.device)[None]
        hidden, _ = self.target.forward(states[None], self.cache, positions, layers=self.deep, added=self.text.added)
        self.logits = self.target.head(hidden[0])
        if self.temperature == 0:
            verdict = Verdict(*accept.greedy(tokens, parents, self.logits.argmax(-1).cpu().numpy()))
        else:
            verdict = self._sample(tokens, parents, self.logits, proposals)
        kept = len(verdict.path) + 1
        self.features, self.finals = states[:kept].clone(), hidden[0, :kept]
        self.cache.keep(range(kept))
        self.last, self.rows = verdict.token, []
        return verdict
