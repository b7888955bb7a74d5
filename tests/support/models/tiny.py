"""Random tiny models, and the name of the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

CPU = torch.device("cpu")
WORDS = ["<eos>", "<unk>", *["the", "a", "of", "and", "in", "to", "is", "it", "on", "we", "you", "def"], ".", ","]
REAL = "smollm2-135m"


def save_draft(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """Save a random Llama of one layer with the tokenizer of another folder, and return its folder."""
    torch.manual_seed(7)
    config: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 2048,
        "initializer_range": 0.4,
        "eos_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**(config | changes))).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
