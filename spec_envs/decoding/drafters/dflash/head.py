"""Weights of a DFlash drafter (arXiv 2602.06036), read from published checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from spec_envs.decoding.drafters.dflash.config import Block, read_config
from spec_envs.decoding.drafters.eagle.head import EagleLayer
from spec_envs.decoding.drafters.eagle.tensors import GROUPS, TABLES, UNREAD, draft_vocabulary, refuse_others
from spec_envs.decoding.drafters.formats import refuse_foreign_tensors
from spec_envs.decoding.drafters.names import drafter_folder
from spec_envs.decoding.weights.files import load_weights

QKV_BIASES, OUT_BIAS = GROUPS[0], "self_attn.o_proj.bias"


class DFlashHead(nn.Module):
    """A DFlash drafter: layers as in Qwen3 between the target's embedding and output rows.

    Args:
        config: of the layers, with ``draft_vocab_size``.
        block: what it reads.
        own_rows: True if it has output rows of its own.

    Attributes:
        d2t, t2d: see ``EagleHead``.
    """

    def __init__(self, config: PretrainedConfig, block: Block, own_rows: bool = False):
        super().__init__()
        self.config, self.block = config, block
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(len(block.boundaries) * hidden, hidden, bias=False)
        self.hidden_norm, self.norm = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
        has = [*GROUPS[2], *((*QKV_BIASES, OUT_BIAS) if config.attention_bias else ())]
        self.layers = nn.ModuleList(EagleLayer(config, has, first=False) for _ in range(config.num_hidden_layers))
        if own_rows:
            self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.d2t: Tensor
        self.t2d: Tensor
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @property
    def draft_ids(self) -> Tensor:
        """Target ids of the draft vocabulary, ``[draft_vocab]``."""
        return self.d2t + torch.arange(len(self.d2t))

    @classmethod
    def load(cls, name: str) -> DFlashHead:
        """Read a drafter by its short name, folder or hub id.

        Raises:
            ValueError: files are missing or damaged, or are not those of a DFlash drafter.
        """
        folder = drafter_folder(name)
        config, block = read_config(folder)
        weights = load_weights(folder)
        refuse_foreign_tensors(weights, folder)
        try:
            return cls.of(config, block, weights)
        except ValueError as error:
            raise ValueError(f"cannot use the DFlash drafter in {folder}: {error}") from None

    @classmethod
    def of(cls, config: PretrainedConfig, block: Block, weights: dict[str, Tensor]) -> DFlashHead:
        """Return a drafter of these tensors, in float32.

        Raises:
            ValueError: tensors are missing, unknown, or do not fit.
        """
        own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        if len(own) < len(weights):
            raise ValueError("it has tensors of one name with and without 'model.' before it; expected one of each")
        # The embedding is the target's (speculators' loader replaces a stored one by it).
        unread = (*UNREAD, "embed_tokens.weight")
        own = {name: tensor for name, tensor in own.items() if name not in unread and not name.endswith(TABLES)}
        draft_vocabulary(own, config.draft_vocab_size, config.vocab_size)
        config.draft_vocab_size = len(own["d2t"])
        with torch.device("meta"):  # sizes that a file claims are compared before anything is allocated
            head = cls(config, block, "lm_head.weight" in own)
        refuse_others(own, head)
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in own.items()}
        head.load_state_dict(floats, assign=True)
        return head
