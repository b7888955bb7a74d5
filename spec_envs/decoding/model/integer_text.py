"""A text that a model in whole numbers reads, each time by one call into the kernels: a step of plain decoding is one."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_void_p

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.model.integers import c_added, c_cache, c_embedding, c_tables
from spec_envs.decoding.model.kernels import threads
from spec_envs.decoding.model.kernels.bindings import CText, address, library
from spec_envs.decoding.model.lora import Additions
from spec_envs.decoding.model.transformer import Transformer

TOGETHER = 16  # numbers of features for which memory is allocated at once
PIECE = 256  # rows of a prompt that are read together; more need more memory and are no faster


class IntegerText:
    """The text that a model reads; see ``target_text.TargetText``.

    The kernels read from and write to memory that is allocated once, and described to them once.

    Args:
        model: in int8 or q4.
        capture: layers whose inputs are the features; see ``Transformer.forward``.
    """

    def __init__(self, model: Transformer, capture: Sequence[int]):
        self.model, self.capture, self.library = model, sorted(capture), library()
        self.added: Additions | None = None
        self.width = len(self.capture) * model.shape.hidden  # of the features
        self.blank: dict[int, list[Tensor]] = {}  # features to be written, by their rows
        self.rows = 0  # that were read last
        self.cache, self.room = model.cache(0), PIECE
        self._describe()

    def begin(self, capacity: int) -> None:
        if capacity > self.cache.capacity:
            self.cache = self.model.cache(max(2048, capacity))
            self._describe()
        self.cache.length = 0

    def append(self, tokens: Sequence[int], choose: bool) -> Tensor:
        features = torch.empty(len(tokens), self.width)
        for at in range(0, len(tokens), PIECE):
            piece = tokens[at : at + PIECE]
            last = at + len(piece) == len(tokens)
            self.tokens[: len(piece)] = piece
            self._read(len(piece), False, int(choose and last))
            self._keep(range(len(piece)), features[at:])
        return features

    def read(self, last: int, tokens: np.ndarray, parents: np.ndarray, choose: bool) -> None:
        n = len(tokens) + 1
        if n > self.room:
            self.room = n
            self._describe()
        self.tokens[0] = last
        self.tokens[1:n], self.parents[: n - 1] = tokens, parents
        self._read(n, n > 1, n if choose else 0)

    def choices(self) -> np.ndarray:
        return self.chosen[: self.count]

    def hidden(self) -> Tensor:
        """Return the hidden states ``[n, hidden]`` of the rows that were read last, until others are read."""
        return self.states[-1][: self.rows]

    def keep(self, rows: Sequence[int]) -> Tensor:
        blank = self.blank.get(len(rows))
        if not blank:  # tensors are made several at a time, which takes no longer than one
            blank = self.blank[len(rows)] = list(torch.empty(TOGETHER, len(rows), self.width).unbind())
        features = blank.pop()
        self._keep(rows, features)
        return features

    def _read(self, rows: int, tree: bool, choose: int) -> None:
        """Read the rows whose tokens are in ``tokens``, and choose tokens after the last ``choose`` of them."""
        cache, structure = self.cache, self.structure
        if cache.length + rows > cache.capacity:
            raise ValueError(f"{cache.length + rows} rows do not fit a cache of {cache.capacity}")
        structure.cache.length = cache.length
        added = c_added(self.added, self.model.layers.structures)
        self.library.read_rows(self.reference, rows, tree, choose, added, threads())
        self.rows, self.count = rows, choose

    def _keep(self, rows: Sequence[int], features: Tensor) -> None:
        """Commit rows that were read last, and write their features.

        Raises:
            IndexError: there are no such rows, or they do not ascend.
        """
        count = len(rows)
        if count and rows[-1] >= self.rows:
            raise IndexError(f"row {rows[-1]} cannot be kept; {self.rows} were read")
        if count > 1 or self.width or (count and rows[0]):
            self.kept[:count] = rows
            self.library.keep_rows(self.reference, count, features.data_ptr())
        self.cache.length += count

    def _describe(self) -> None:
        """Allocate memory for ``room`` rows, and describe it to the kernels with the model and the cache."""
        model, room = self.model, self.room
        layers, shape = model.layers.structures, model.shape
        self.tokens, self.parents, self.kept, self.chosen = np.empty((4, room), np.int64)
        # The states that are captured, and those after all layers.
        self.states = torch.empty(len(self.capture) + 1, room, shape.hidden)
        places = {layer: self.states[i] for i, layer in enumerate(self.capture) if layer < shape.layers}
        wanted = [places.get(layer, self.states[-1]) for layer in self.capture]
        captured = (c_void_p * shape.layers)(*(address(places.get(layer)) for layer in range(shape.layers)))
        features = (c_void_p * len(wanted))(*map(address, wanted))
        self.structure = CText(
            layers,
            len(layers),
            c_embedding(model.embedding),
            c_tables(model.rope),
            address(model.norm.weight),
            model.head.linear.matrix,
            c_cache(self.cache),
            room,
            *(numbers.ctypes.data for numbers in (self.tokens, self.parents, self.kept)),
            address(self.states[-1]),
            captured,
            features,
            len(wanted),
            self.chosen.ctypes.data,
        )
        self.reference = byref(self.structure)
