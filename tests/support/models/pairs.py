"""Random models of every family, in int8 with the kernels and with torch."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from spec_envs.decoding.model.transformer import Transformer
from tests.support.models import quantised
from tests.support.models.tiny import CPU

SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 150,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-bias": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**{**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 4}),
    "qwen3": Qwen3Config(**{**SHAPE, "head_dim": 64}),
}


def pair(config: PretrainedConfig) -> tuple[Transformer, Transformer]:
    """Return the same random model in int8 with the kernels and with torch."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    weights = model.state_dict()
    return Transformer(config, weights, torch.int8, CPU), quantised.reference(config, weights)
