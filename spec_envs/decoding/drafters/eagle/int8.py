"""EAGLE-3 head in int8."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.drafters.eagle.drafter import EagleModel
from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.drafters.int8_step import Int8Step
from spec_envs.decoding.drafters.vocabulary import Vocabulary
from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.kernels.bindings import floats
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.tree import Children


class Int8EagleModel(EagleModel):
    """A step as one call into the kernels, which know no other order of norms than that of the first heads (see
    ``EagleModel``, which computes the others part by part in int8)."""

    def __init__(self, head: EagleHead, target: Transformer):
        super().__init__(head, target)
        self.call = Int8Step(
            self.layers,
            self.norm,
            self.lm_head,
            self.embedding,
            self.rope,
            self.lm_head.outputs,
            (self.input_norm, self.hidden_norm),
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
        index, log_probs, entropies = self.call(output, tokens, positions, cache, vocabulary.rows, width, last, seen)
        return output, Children(vocabulary.ids[index], log_probs, entropies)


def eagle_model(head: EagleHead, target: Transformer) -> EagleModel:
    """The head in the target's dtype."""
    other_order = head.variant.norm_before_residual or head.variant.norm_output
    return (EagleModel if other_order or target.dtype != torch.int8 else Int8EagleModel)(head, target)
