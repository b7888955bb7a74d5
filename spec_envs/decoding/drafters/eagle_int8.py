"""EAGLE-3 head in int8: a whole draft step is one call into the kernels, since it is made several times a cycle."""

from __future__ import annotations

from ctypes import byref

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.cache import KVCache
from spec_envs.decoding.drafters.eagle import EagleModel
from spec_envs.decoding.drafters.eagle_head import EagleHead
from spec_envs.decoding.drafters.vocabulary import Vocabulary
from spec_envs.decoding.int8 import c_cache, c_tables
from spec_envs.decoding.kernels import threads
from spec_envs.decoding.kernels.bindings import CEagle, address, floats, library
from spec_envs.decoding.transformer import Transformer
from spec_envs.decoding.tree import Children


class Int8EagleModel(EagleModel):
    """See ``EagleModel``."""

    def __init__(self, head: EagleHead, target: Transformer):
        super().__init__(head, target)
        norms = (self.input_norm.weight, self.hidden_norm.weight, self.norm.weight)
        self.structure = CEagle(
            self.layers.structures,
            address(target.embedding),
            len(target.embedding),
            *map(address, norms),
            c_tables(self.rope),
            self.lm_head.matrix,
        )

    def step(
        self,
        hidden: Tensor,
        tokens: np.ndarray,
        positions: np.ndarray,
        cache: KVCache,
        vocabulary: Vocabulary,
        width: int,
        last: int,
        seen: np.ndarray | None = None,
    ) -> tuple[Tensor, Children]:
        """See ``EagleModel.step``."""
        output = floats(hidden).clone()
        extra = vocabulary.rows
        index, log_probabilities = np.empty((last, width), np.int64), np.empty((last, width), np.float32)
        entropies = np.empty(last, np.float32)
        seen = None if seen is None else np.ascontiguousarray(seen)
        library().eagle(
            byref(self.structure),
            output.data_ptr(),
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
        return output, Children(vocabulary.ids[index], log_probabilities, entropies)


def eagle_model(head: EagleHead, target: Transformer) -> EagleModel:
    """The head in the target's dtype."""
    return (Int8EagleModel if target.dtype == torch.int8 else EagleModel)(head, target)
