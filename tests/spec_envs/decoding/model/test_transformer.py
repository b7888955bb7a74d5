"""The forward equals that of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from spec_envs.decoding.model import batch
from spec_envs.decoding.model.batch import generate_batch, read_batch, read_prompts
from spec_envs.decoding.model.graphs import GraphedLayers
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.tree import ROOT, ancestors
from spec_envs.decoding.weights.checkpoints import load_target, model_folder
from spec_envs.experiments.measure.references import transformers_model
from tests.support.models.forwards import text_logits
from tests.support.models.tiny import CPU, REAL

TOLERANCE = 2e-3
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-rope3-bias": LlamaConfig(
        **SHAPE, rope_parameters=LLAMA3_ROPE, attention_bias=True, tie_word_embeddings=False
    ),
    "mistral": MistralConfig(**SHAPE, head_dim=24, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
}


def pair(config: PretrainedConfig) -> tuple[Transformer, torch.nn.Module]:
    """Return the same random model here and in transformers."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return Transformer(config, reference.state_dict(), torch.float32, CPU), reference


def token_by_token(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Return logits ``[1, n, vocab]`` of a text that is read one token at a time."""
    cache, rows = model.cache(ids.shape[1]), []
    for i in range(ids.shape[1]):
        x, _ = model.forward(model.embed(ids[:, i : i + 1]), cache, torch.tensor([[i]]))
        cache.length += 1
        rows.append(model.head(x))
    return torch.cat(rows, 1)


def check_tree(model: Transformer, reference: torch.nn.Module, vocab: int, prefix: int) -> None:
    """Assert that every row of a tree forward equals the last row of the reference on that node's path."""
    rng = np.random.default_rng(0)
    text = torch.tensor(rng.integers(0, vocab, (1, prefix)))
    parents = np.array([ROOT, ROOT, 0, 0, 1, 2, 5])
    levels = np.array([0, 0, 1, 1, 1, 2, 3])
    tokens = rng.integers(0, vocab, len(parents))
    cache = model.cache(prefix + 20)
    model.forward(model.embed(text[:, :-1]), cache, torch.arange(prefix - 1)[None])
    cache.length = prefix - 1
    seen = torch.from_numpy(ancestors(parents))
    ids = torch.cat([text[:, -1:], torch.from_numpy(tokens)[None]], 1)
    at = torch.from_numpy(prefix - 1 + np.concatenate([[0], levels + 1]))[None]
    logits = model.head(model.forward(model.embed(ids), cache, at, seen)[0])[0]
    for node in range(-1, len(parents)):
        path, walk = [], node
        while walk != ROOT:
            path.insert(0, int(tokens[walk]))
            walk = int(parents[walk])
        full = torch.cat([text, torch.tensor([path], dtype=torch.long)], 1)
        assert (reference(full).logits[0, -1] - logits[node + 1]).abs().max() <= TOLERANCE
    cache.keep([0, 1, 3, 6])  # root, and the path 0, 2, 5
    after = torch.cat([text, torch.tensor([[*tokens[[0, 2, 5]], 7]])], 1)
    x, _ = model.forward(model.embed(after[:, -1:]), cache, torch.tensor([[cache.length]]))
    assert (reference(after).logits[0, -1] - model.head(x)[0, -1]).abs().max() <= TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_models_equal_transformers(name: str) -> None:
    model, reference = pair(CONFIGS[name])
    ids = torch.randint(0, 120, (1, 80), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits
    assert (text_logits(model, ids) - expected).abs().max() <= TOLERANCE
    assert (token_by_token(model, ids) - expected).abs().max() <= TOLERANCE
    check_tree(model, reference, 120, 30)


@torch.inference_mode()
def test_ranges_of_layers_and_captured_states() -> None:
    model, reference = pair(CONFIGS["qwen3"])
    ids = torch.randint(0, 120, (1, 12))
    positions = torch.arange(12)[None]
    states = reference(ids, output_hidden_states=True).hidden_states
    x, captured = model.forward(model.embed(ids), model.cache(12), positions, capture=(0, 2))
    assert [(c - states[i]).abs().max() < 1e-4 for c, i in zip(captured, (0, 2), strict=True)] == [True, True]
    cache = model.cache(12)
    shallow, _ = model.forward(model.embed(ids), cache, positions, layers=range(0, 2))
    deep, _ = model.forward(shallow, cache, positions, layers=range(2, 3))
    assert torch.equal(deep, x)


@torch.inference_mode()
@pytest.mark.model
def test_default_model_equals_transformers() -> None:
    model = load_target(REAL, CPU, "float32")
    reference = transformers_model(model_folder(REAL), torch.float32)
    ids = torch.randint(3, 49152, (1, 256), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).logits
    assert (text_logits(model, ids) - expected).abs().max() <= TOLERANCE
    assert (token_by_token(model, ids) - expected).abs().max() <= TOLERANCE
    check_tree(model, reference, 49152, 60)


@torch.inference_mode()
def test_batched_generation_equals_one_by_one() -> None:
    model, reference = pair(CONFIGS["qwen2"])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 120, n).tolist() for n in (3, 17, 9, 30, 5, 12, 4, 8, 6)]
    together = generate_batch(model, prompts, 20, eos={7, 11, 30})
    for prompt, text in zip(prompts, together, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=[7, 11, 30],
            pad_token_id=0,
        )
        assert text == expected[0, len(prompt) :].tolist()
    features, final = read_batch(model, prompts, capture=(1,))
    for row, prompt in enumerate(prompts):
        states = reference.model(torch.tensor([prompt]), output_hidden_states=True)
        assert (features[row, -len(prompt) :] - states.hidden_states[1][0]).abs().max() < 1e-3
        assert (final[row, -len(prompt) :] - states.last_hidden_state[0]).abs().max() < 1e-3


@torch.inference_mode()
def test_prompts_read_in_groups_give_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many prompts a forward reads, texts and rows of the cache are the same, and the cache has room for them."""
    model, _ = pair(CONFIGS["llama"])
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 120, n).tolist() for n in rng.permutation([1, 2, 40, 41, 90, 90, 3, 17, 60, 5, 5])]
    found = []
    for at_once in (len(prompts), 1, 3):
        monkeypatch.setattr(batch, "READ_AT_ONCE", at_once)
        cache, padding, last = read_prompts(model, prompts, 7)
        assert cache.capacity == 90 + 7 and cache.length == 90 and (90 - padding).tolist() == list(map(len, prompts))
        rows = [cache.data[:, :, i, :, int(left) : cache.length] for i, left in enumerate(padding)]
        found.append((torch.cat(rows, 3), last))
        texts = generate_batch(model, prompts, 25, eos={7})
        assert texts == [generate_batch(model, [prompt], 25, eos={7})[0] for prompt in prompts]
    for rows, last in found[1:]:
        assert (rows - found[0][0]).abs().max() < 1e-3 and (last - found[0][1]).abs().max() < 1e-3


def test_a_text_that_has_all_that_is_wanted_ends() -> None:
    model, _ = pair(CONFIGS["llama"])
    prompts = [[1, 2, 3], [4], [5, 6]]
    whole = generate_batch(model, prompts, 12, eos=())
    ends = generate_batch(model, prompts, 12, eos=(), ends=lambda text: len(text) == 3 or text[-1] == whole[1][1])
    assert ends == [text[:2] if whole[1][1] in text[:2] else text[:3] for text in whole] and len(ends[1]) == 2


def test_unsupported_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'gpt2' is not supported.*llama, mistral, qwen2, qwen3"):
        Transformer(GPT2Config(), {}, torch.float32, CPU)


def test_weights_of_another_config_are_refused() -> None:
    _, reference = pair(CONFIGS["llama"])
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 5})
    with pytest.raises(ValueError, match=r"do not fit their config.json"):
        Transformer(config, reference.state_dict(), torch.float32, CPU)


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_graphed_layers_equal_transformers(name: str) -> None:
    """Fixed shapes, indices in tensors and buckets of columns are used without a GPU: a stand-in replays the
    function that a graph would capture."""
    recorded = []

    def record(run: Callable) -> tuple[Callable[[], None], Any]:
        recorded.append(1)
        hidden, captured = run()

        def replay() -> None:
            again, states = run()
            hidden.copy_(again)
            for old, new in zip(captured, states, strict=True):
                old.copy_(new)

        return replay, (hidden, captured)

    model, reference = pair(CONFIGS[name])
    model.layers = GraphedLayers(model.layers, record)
    ids = torch.randint(0, 120, (1, 80), generator=torch.Generator().manual_seed(0))
    assert (text_logits(model, ids) - reference(ids).logits).abs().max() <= TOLERANCE
    recorded.clear()
    assert (token_by_token(model, ids) - reference(ids).logits).abs().max() <= TOLERANCE
    assert len(recorded) == 1  # one graph for eighty steps
    check_tree(model, reference, 120, 30)
    check_tree(model, reference, 120, 254)  # the tree is in the next bucket
    states = reference(ids, output_hidden_states=True).hidden_states
    cache = model.cache(80)
    model.forward(model.embed(ids[:, :70]), cache, torch.arange(70)[None])
    cache.length = 70
    recorded.clear()
    _, captured = model.forward(model.embed(ids[:, 70:]), cache, torch.arange(70, 80)[None], capture=(1,))
    assert recorded and (captured[0] - states[1][:, 70:]).abs().max() < 1e-3
