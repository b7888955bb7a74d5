"""A draft step in int8 as one call into the kernels, since it is made several times a cycle."""

from __future__ import annotations

from ctypes import byref

import numpy as np
from torch import Tensor

from spec_envs.decoding.cache import KVCache
from spec_envs.decoding.int8 import Layers, Linear, RMSNorm, c_cache, c_tables
from spec_envs.decoding.kernels import threads
from spec_envs.decoding.kernels.bindings import CDrafter, address, library
from spec_envs.decoding.rope import Rope


class Int8Step:
    """One forward of a drafter and the most probable next tokens.

    Args:
        layers, norm, head: of the drafter; the norm is that in front of the head.
        embedding: bfloat16 ``[vocab, hidden]``.
        rope: tables of the drafter.
        outputs: how many of the head's outputs can be drafted, the first ones.
        entering: of an EAGLE-3 head, the norms of embedding and hidden state.
    """

    def __init__(
        self,
        layers: Layers,
        norm: RMSNorm,
        head: Linear,
        embedding: Tensor,
        rope: Rope,
        outputs: int,
        entering: tuple[RMSNorm, RMSNorm] | None = None,
    ):
        self.kept = layers, norm, head, embedding, rope, entering  # what the structure points to
        self.hidden = embedding.shape[1]
        norms = (*(n.weight for n in entering), norm.weight) if entering else (None, None, norm.weight)
        self.structure = CDrafter(
            layers.structures,
            len(layers.structures),
            address(embedding),
            len(embedding),
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
        """Rows written to the cache behind its committed ones.

        Args:
            hidden: float32 ``[n, hidden]``, in place: of an EAGLE-3 head what its rows read; what they become.
            tokens, positions: int64 ``[n]``.
            extra: output rows of further tokens ``[m, hidden]``, or None.
            last: how many rows, counted from the end, are asked for children.
            seen: see ``KVCache.mask``.

        Returns:
            Indices and log-probabilities ``[last, width]`` of the children, the further tokens behind the head's, and
            the entropies ``[last]``.
        """
        index, log_probabilities = np.empty((last, width), np.int64), np.empty((last, width), np.float32)
        entropies = np.empty(last, np.float32)
        seen = None if seen is None else np.ascontiguousarray(seen)
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
