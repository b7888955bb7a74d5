"""A random tiny target and drafter for tests of logic, and the settings of Hypothesis.

The tiny target has 16 tokens, so that the ten best children of a random drafter nearly always include the target's
choice: trees are accepted deep, which exercises everything after acceptance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.eagle.config import Variant
from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_target
from spec_envs.decoding.weights.files import load_weights
from tests.support.models.tiny import CPU, WORDS, save_draft

pytest_plugins = ["tests.support.recordings"]

# The same few examples in every run; `make fuzz` draws many new ones. A slow test takes a share of
# `settings.default.max_examples`.
settings.register_profile("quick", derandomize=True, deadline=None, max_examples=30)
settings.register_profile("fuzz", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prompts", type=int, default=20, help="prompts of the int8 losslessness test (default 20)")


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in the Hugging Face layout with a random Llama of eight layers."""
    folder = tmp_path_factory.mktemp("tiny-target")
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(WORDS),
        max_position_embeddings=2048,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} . {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_drafter(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a head for the tiny target that starts as the target's own last layer, over 14 of its 16 tokens."""
    folder = tmp_path_factory.mktemp("tiny-drafter")
    target = load_target(str(tiny_target), CPU, "float32")
    head = EagleHead.from_target(target, load_weights(tiny_target), torch.arange(14))
    head.save(folder, torch.float32)
    return folder


@pytest.fixture(scope="session")
def tiny_parallel(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a parallel head of the same origin, for blocks of 5 tokens."""
    target = load_target(str(tiny_target), CPU, "float32")
    variant = Variant(mask_token=15, block=5)
    head = EagleHead.from_target(target, load_weights(tiny_target), torch.arange(14), variant)
    with torch.no_grad():
        head.mask_hidden.normal_(generator=torch.Generator().manual_seed(2))
    head.save(folder := tmp_path_factory.mktemp("tiny-parallel"), torch.float32)
    return folder


@pytest.fixture(scope="session")
def tiny_draft(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_draft(tmp_path_factory.mktemp("tiny-draft"), tiny_target)


@pytest.fixture(scope="session")
def tiny(tiny_target: Path, tiny_drafter: Path) -> dict[str, Any]:
    """Return keyword arguments of an environment over the tiny pair with a priced clock."""
    return {
        "target": str(tiny_target),
        "drafter": str(tiny_drafter),
        "device": "cpu",
        "dtype": "float32",
        "clock": "qwen3-14b-a6000",
        "max_new_tokens": 24,
    }


@pytest.fixture
def tiny_decoder(tiny: dict[str, Any]) -> Decoder:
    """Return a decoder over the tiny pair."""
    return load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
