"""A draft step in int8 as one call into the kernels, because it is made several times a cycle."""

from __future__ import annotations

from ctypes import byref

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.int8 import Layers, Linear, RMSNorm, c_cache, c_embedding, c_tables
from spec_envs.decoding.model.kernels import threads
from spec_envs.decoding.model.kernels.bindings import CDrafter, address, library
from spec_envs.decoding.model.rope import Rope
from spec_envs.decoding.model.rows import Rows


class Int8Step:
    """One forward of a drafter, from tokens to the most probable next tokens.

    Args:
        layers, norm, head: parts of the drafter; the norm is the one before the head.
        embedding: bfloat16 ``[vocab, hidden]``, or a product whose outputs are the tokens.
        rope: rotary tables of the drafter.
        outputs: how many of the head's first outputs can be drafted.
        entering: for an EAGLE-3 head, the norms of the embedding and of the hidden state.

    Raises:
        ValueError: the parts have different widths.
    """

    def __init__(
        self,
        layers: Layers,
        norm: RMSNorm,
        head: Linear,
        embedding: Tensor | Linear,
        rope: Rope,
        outputs: int,
        entering: tuple[RMSNorm, RMSNorm] | None = None,
    ):
        self.kept = layers, norm, head, embedding, rope, entering  # alive while the structure points to them
        self.layers, self.rope, self.outputs = layers, rope, outputs
        self.hidden = embedding.inputs if isinstance(embedding, Linear) else embedding.shape[1]
        reads, both = layers.structures[0].qkv.inputs, (norm, *(entering or ()))
        widths = [layers.shape.hidden, head.inputs, *(len(n.weight) for n in both)]
        if {self.hidden, *widths} != {self.hidden} or reads != self.hidden * len(both[:2]) or outputs > head.outputs:
            raise ValueError(
                f"the parts of a drafter of hidden size {self.hidden} do not fit together: {widths}, {reads}"
            )
        norms = (*(n.weight for n in entering), norm.weight) if entering else (None, None, norm.weight)
        self.structure = CDrafter(
            layers.structures,
            len(layers.structures),
            c_embedding(embedding),
            *map(address, norms),
            c_tables(rope),
            head.matrix,
            outputs,
        )

    def __call__(
        self,
        hidden: Tensor,
        tokens: np.ndarray,
        positions: np.ndarray,
        cache: KVCache,
        extra: Tensor | None,
        width: int,
        last: int,
        seen: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Make one forward; its rows are written to the cache after the committed ones, which they do not join.

        Args:
            hidden: float32 ``[n, hidden]``, overwritten by the last layer's output; an EAGLE-3 head reads it first.
            tokens, positions: int64 ``[n]``.
            extra: output rows ``[m, hidden]`` of further tokens, or None.
            width: children per row.
            last: how many rows, counted from the end, get children.
            seen: see ``KVCache.mask``.

        Returns:
            Indices ``[last, width]`` of the children (further tokens are numbered after the head's outputs), their
            log-probabilities ``[last, width]``, and the entropies ``[last]`` in nats.

        Raises:
            IndexError: arrays of other sizes or dtypes, or rows that do not fit the cache.
        """
        index, log_probabilities = np.empty((last, width), np.int64), np.empty((last, width), np.float32)
        entropies = np.empty(last, np.float32)
        seen = None if seen is None else np.ascontiguousarray(seen)
        self._check(hidden, tokens, positions, cache, extra, width, last, seen)
        library().draft(
            byref(self.structure),
            hidden.data_ptr(),
            tokens.ctypes.data,
            len(tokens),
            positions.ctypes.data,
            byref(c_cache(cache)),
            None if seen is None else seen.ctypes.data,
            0 if seen is None else seen.shape[1],
            last,
            address(extra),
            0 if extra is None else len(extra),
            width,
            index.ctypes.data,
            log_probabilities.ctypes.data,
            entropies.ctypes.data,
            threads(),
        )
        return index, log_probabilities, entropies

    def _check(
        self,
        hidden: Tensor,
        tokens: np.ndarray,
        positions: np.ndarray,
        cache: KVCache,
        extra: Tensor | None,
        width: int,
        last: int,
        seen: np.ndarray | None,
    ) -> None:
        """Raise IndexError for arrays of other sizes or dtypes than the kernels assume."""
        at, mask = torch.from_numpy(positions)[None], None if seen is None else torch.from_numpy(seen)
        self.layers.check_rows(Rows(hidden[None], cache, self.rope, at, mask), 1)
        choices = self.outputs + (0 if extra is None else len(extra))
        fits = (
            cache.data.shape[2] == 1
            and hidden.dtype == torch.float32
            and hidden.is_contiguous()
            and tokens.shape == positions.shape
            and tokens.dtype == positions.dtype == np.int64
            and tokens.flags.c_contiguous
            and positions.flags.c_contiguous
            and 0 <= last <= len(tokens)
            and 1 <= width <= choices
            and (extra is None or (extra.shape[1] == self.hidden and extra.dtype == torch.float32))
            and (extra is None or extra.is_contiguous())
        )
        if not fits:
            raise IndexError(
                f"{len(tokens)} rows do not fit a draft of the {width} best of {choices} after {last} of them"
            )
