"""The text that a target reads: tokens in, hidden states and choices out, and which of the rows stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.model import integers
from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.integer_text import IntegerText
from spec_envs.decoding.model.lora import Additions
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.tree import ancestors


class TargetText(Protocol):
    """One text under a target, from its first token on.

    Attributes:
        cache: keys and values of the text.
        added: what low-rank adapters add to the target's layers, or None.
    """

    cache: KVCache
    added: Additions | None

    def begin(self, capacity: int) -> None:
        """Forget the text; the next one has at most ``capacity`` rows, drafted ones included."""

    def append(self, tokens: Sequence[int], choose: bool) -> Tensor:
        """Read and commit tokens ``[n]``; return their features ``[n, captured layers * hidden]``.

        Args:
            choose: whether the token after the last one is to be chosen.
        """

    def read(self, last: int, tokens: np.ndarray, parents: np.ndarray, choose: bool) -> None:
        """Read ``last``, the root, and nodes that continue it; commit nothing.

        Args:
            tokens, parents: of the nodes ``[n]``; see ``Tree.subtree``.
            choose: whether the tokens after the root and after every node are to be chosen.

        Raises:
            ValueError: the rows do not fit the cache.
            IndexError: the target has no such token or position, or a node comes before its parent.
        """

    def choices(self) -> np.ndarray:
        """Return the target's argmax after each of the last rows that was to be chosen, ``[n + 1]``."""

    def hidden(self) -> Tensor:
        """Return the hidden states before the final norm of the rows that were read last, ``[…, hidden]``, until others
        are read. Of a long prompt these may be its last rows only."""

    def keep(self, rows: Sequence[int]) -> Tensor:
        """Commit rows that were read last (ascending; 0 is the root), and return their features."""


class TorchText:
    """The text that a target reads which torch computes; see ``TargetText``.

    Args:
        target: the model.
        capture: layers whose inputs are the features; see ``Transformer.forward``.
    """

    def __init__(self, target: Transformer, capture: Sequence[int]):
        self.target, self.capture = target, capture
        self.added: Additions | None = None
        self.cache = target.cache(0)

    def begin(self, capacity: int) -> None:
        if capacity > self.cache.capacity:
            self.cache = self.target.cache(max(2048, capacity))
        self.cache.length = 0

    @torch.inference_mode()
    def append(self, tokens: Sequence[int], choose: bool) -> Tensor:
        self._forward(np.asarray(tokens), np.arange(len(tokens)), None)
        self.cache.length += len(tokens)
        self.chooses = 1 if choose else 0
        return self.features

    @torch.inference_mode()
    def read(self, last: int, tokens: np.ndarray, parents: np.ndarray, choose: bool) -> None:
        seen = ancestors(parents)
        self._forward(np.concatenate([[last], tokens]), seen.sum(1) - 1, seen if len(tokens) else None)
        self.chooses = len(seen) if choose else 0

    @torch.inference_mode()
    def choices(self) -> np.ndarray:
        rows = self.states[len(self.states) - self.chooses :]
        chosen: np.ndarray = self.target.head.argmax(rows).cpu().numpy()
        return chosen

    def hidden(self) -> Tensor:
        return self.states

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> Tensor:
        self.cache.keep(rows)
        return self.features[list(rows)]

    def _forward(self, tokens: np.ndarray, after: np.ndarray, seen: np.ndarray | None) -> None:
        """Run the target on new rows; ``after`` is how far behind the committed rows each one's position is, ``[n]``."""
        device = self.target.device
        x = self.target.embed(torch.from_numpy(tokens).to(device)[None])
        at = torch.from_numpy(self.cache.length + after).to(device)[None]
        rows = None if seen is None else torch.from_numpy(seen).to(device)
        hidden, captured = self.target.forward(x, self.cache, at, rows, capture=self.capture, added=self.added)
        self.states: Tensor = hidden[0]
        self.features = torch.cat(captured, -1)[0] if captured else self.states[:, :0]


def open_text(target: Transformer, capture: Sequence[int] = ()) -> TargetText:
    """Return an empty text under a target, computed as the target is."""
    return IntegerText(target, capture) if isinstance(target.layers, integers.Layers) else TorchText(target, capture)
