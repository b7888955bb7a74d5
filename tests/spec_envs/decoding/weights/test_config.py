"""Configs of the four architectures give the logits and text of transformers' own models, or are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from spec_envs.decoding.model import integers
from spec_envs.decoding.model.batch import generate_batch
from spec_envs.decoding.model.rope import Rope
from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.model.transformer import Transformer
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.forwards import text_logits
from tests.support.models.quantised import random_weights
from tests.support.models.tiny import CPU

ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": False, "beta_fast": 8.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "attention_factor": 0.7},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 0.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 16},
    {"rope_type": "unheard-of"},
]  # fmt: skip
FAMILIES: dict[type[PretrainedConfig], dict[str, list]] = {
    LlamaConfig: {"attention_bias": [False, True], "mlp_bias": [False, True]},
    MistralConfig: {"sliding_window": [None, 20, 4096]},
    Qwen2Config: {
        "use_sliding_window": [False, True],
        "sliding_window": [20, 4096],
        "max_window_layers": [0, 1, 2],
    },
    Qwen3Config: {
        "attention_bias": [False, True],
        "use_sliding_window": [False, True],
        "sliding_window": [20],
        "max_window_layers": [0, 2],
    },
}
CONTEXT, VOCAB, NEW = 40, 50, 12
STORED = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@st.composite
def configs(draw: st.DrawFn) -> PretrainedConfig:
    """Draw any config that transformers accepts; most of them can be computed here."""
    family = draw(st.sampled_from(list(FAMILIES)))
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    head_dim = draw(st.sampled_from([2, 6, 16, 32, 32, 64]))
    rope = {**draw(st.sampled_from(ROPES)), "rope_theta": draw(st.sampled_from([100.0, 10_000.0, 5e5]))}
    if rope["rope_type"] == "longrope":
        rope |= {name: [1.5] * (head_dim // 2) for name in ("short_factor", "long_factor")}
    if draw(st.integers(0, 7)) == 0:
        rope["partial_rotary_factor"] = draw(st.sampled_from([0.25, 0.5, 1.0]))
    whole_groups = [n for n in range(1, heads + 1) if heads % n == 0]
    kv_heads = draw(st.sampled_from(whole_groups if draw(st.integers(0, 9)) else [*range(1, 8)]))
    try:
        return family(
            hidden_size=heads * draw(st.sampled_from([6, 8, 16, 16])),
            intermediate_size=draw(st.sampled_from([1, 20, 48, 48])),
            num_hidden_layers=draw(st.sampled_from([1, 2])),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=VOCAB,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=draw(st.booleans()),
            rms_norm_eps=draw(st.sampled_from([0.0, 1e-6, 1e-5, 0.1])),
            hidden_act=draw(st.sampled_from(["silu"] * 9 + ["swish", "gelu"])),
            rope_parameters=rope,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
            **{name: draw(st.sampled_from(options)) for name, options in FAMILIES[family].items()},
        )
    except StrictDataclassError:
        assume(False)
        raise


def random_model(config: PretrainedConfig, seed: int, stored: torch.dtype) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return transformers' model in float32, and its weights rounded as a file of that dtype stores them."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    weights = {name: tensor.to(stored) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    return model, weights


def logits(model: Transformer, ids: Tensor) -> Tensor:
    """Return logits ``[n, vocab]`` of a text in one forward, in float32."""
    return text_logits(model, ids)[0].float()


def reference_text(reference: PreTrainedModel, prompt: list[int], eos: list[int], room: int) -> list[int]:
    """Return the greedy text of transformers, up to ``room`` tokens."""
    ids = torch.tensor([prompt])
    made = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
        eos_token_id=eos or None, pad_token_id=0,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()


def same_text(ours: list[int], theirs: list[int], reference: PreTrainedModel, prompt: list[int]) -> bool:
    """Return True if the texts are equal, or first differ between two tokens of equal logits."""
    for at, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            row = reference(torch.tensor([prompt + theirs[:at]])).logits[0, -1]
            return bool((row[a] - row[b]).abs() < 1e-3 * row.abs().max())
    return len(ours) == len(theirs)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of ``theirs``."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.fuzz
@torch.inference_mode()
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    config=configs(),
    seed=st.integers(0, 2**31),
    stored=st.sampled_from(STORED),
    eos=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    length=st.integers(1, CONTEXT),
)
def test_any_config_equals_transformers_or_is_refused(
    config: PretrainedConfig, seed: int, stored: torch.dtype, eos: list[int], length: int
) -> None:
    try:
        shape = Shape.from_config(config)
        Rope(config, shape.head_dim, shape.context, torch.float32, CPU)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    event("computed")
    reference, weights = random_model(config, seed, stored)
    length = min(length, shape.context)
    prompt = np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
    ids = torch.tensor([prompt])
    expected = reference(ids).logits[0]
    assert torch.isfinite(expected).all()
    model = Transformer(config, weights, torch.float32, CPU)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-3)
    if room := min(NEW, shape.context - length):
        theirs = reference_text(reference, prompt, eos, room)
        assert same_text(generate_batch(model, [prompt], room, eos)[0], theirs, reference, prompt)
    for dtype, bound in ((torch.bfloat16, 0.2), (torch.float16, 0.05)):
        low = logits(Transformer(config, weights, dtype, CPU), ids)
        assert torch.isfinite(low).all() and distance(low, expected) < bound, dtype
    if not WITHOUT_KERNELS and integers.computes(config):
        event("in int8")
        check_int8(Transformer(config, weights, torch.int8, CPU), ids, expected)


def check_int8(model: Transformer, ids: Tensor, expected: Tensor) -> None:
    """Assert that logits are close to those of float32, and that each row has the same bits alone and among others."""
    ours = logits(model, ids)
    assert distance(ours, expected) < 0.25
    cache = model.cache(ids.shape[1])
    for i in range(ids.shape[1]):
        hidden, _ = model.forward(model.embed(ids[:, i : i + 1]), cache, torch.tensor([[i]]))
        cache.length += 1
        assert torch.equal(model.head(hidden)[0, 0], ours[i])


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
WHOLE = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        (
            LlamaConfig,
            {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 4},
            "6 attention heads over 4",
        ),
        (LlamaConfig, {"num_attention_heads": 2, "num_key_value_heads": 4}, "2 attention heads over 4"),
        (LlamaConfig, {"num_key_value_heads": 0}, "kv_heads = 0; expected 1 or more"),
        (LlamaConfig, {"num_hidden_layers": 0}, "layers = 0; expected 1 or more"),
        (LlamaConfig, {"max_position_embeddings": 0}, "context = 0; expected 1 or more"),
        (LlamaConfig, {"head_dim": 3}, "heads of size 3; rotary positions need an even one"),
        (LlamaConfig, {"head_dim": -8}, "head_dim = -8; expected 1 or more"),
        (LlamaConfig, {"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0; expected a finite number"),
        (LlamaConfig, {"rms_norm_eps": float("nan")}, "rms_norm_eps = nan; expected a finite number"),
        (LlamaConfig, {"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
        (LlamaConfig, {"is_causal": False}, "is_causal = false"),
        (MistralConfig, {"sliding_window": 0}, "sliding_window = 0"),
        (MistralConfig, {"sliding_window": -5}, "sliding_window = -5"),
        (Qwen2Config, {"layer_types": ["sliding_attention"] * 2}, "sliding_window = None"),
        (Qwen2Config, {"layer_types": ["chunked_attention"] * 2}, "layers of chunked_attention are not supported"),
        (Qwen2Config, {"rope_parameters": WHOLE}, "rope type None is not supported"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "linear"}}, "are not those of type 'linear'"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 0}}, "not finite numbers"),
        (LlamaConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "not finite numbers"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
    ],
)
def test_unsupported_configs_are_refused_in_one_sentence(
    family: type[PretrainedConfig], changes: dict[str, Any], sentence: str
) -> None:
    try:
        config = family(**{**SMALL, **changes})
    except (StrictDataclassError, KeyError):  # transformers itself refuses the config
        return
    with pytest.raises(ValueError, match=sentence) as caught:
        Transformer(config, random_weights(LlamaConfig(**SMALL), torch.Generator()), torch.float32, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "context"),
    [
        (MistralConfig, {"sliding_window": 20, "use_sliding_window": False}, 20),  # Mistral has no such switch
        (MistralConfig, {"sliding_window": None}, CONTEXT),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}, CONTEXT),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, 20),
        (Qwen2Config, {"use_sliding_window": False, "sliding_window": 20}, CONTEXT),
    ],
)
def test_context_ends_at_sliding_window(family: type[PretrainedConfig], changes: dict[str, Any], context: int) -> None:
    assert Shape.from_config(family(**{**SMALL, **changes})).context == context


def from_folder(config: PretrainedConfig, weights: dict[str, Tensor], folder: Path) -> Tensor:
    """Save a model, and return the logits that transformers gives for the files."""
    config.architectures = [AutoModelForCausalLM.from_config(config).__class__.__name__]
    config.save_pretrained(folder)
    save_file(
        {name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits[0]


IDS = torch.arange(7)[None]


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("files", ["others", "tied", "tied by the output rows", "tied but different"])
def test_ignored_and_tied_tensors_are_those_of_transformers(
    family: type[PretrainedConfig], files: str, tmp_path: Path
) -> None:
    """Biases and norms that the config does not have are ignored; of tied weights either may be present, or two
    tensors."""
    config = family(**SMALL, tie_word_embeddings=files.startswith("tied"))
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(config, generator)
    if files == "others":
        known = set(weights)
        stray = ["q_proj.bias", "k_proj.bias", "o_proj.bias", "q_norm.weight", "k_norm.weight", "rotary_emb.inv_freq"]
        sizes = dict.fromkeys(stray, 8) | {"q_proj.bias": 32, "k_proj.bias": 16, "o_proj.bias": 32}
        for name, size in sizes.items():
            if (full := f"model.layers.1.self_attn.{name}") not in known:
                weights[full] = torch.randn(size, generator=generator)
        if "model.layers.1.mlp.up_proj.bias" not in known:
            weights["model.layers.1.mlp.up_proj.bias"] = torch.randn(48, generator=generator)
    elif files == "tied by the output rows":
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    elif files == "tied but different":
        weights["lm_head.weight"] = torch.randn(VOCAB, 32, generator=generator)
    model = Transformer(config, weights, torch.float32, CPU)
    torch.testing.assert_close(logits(model, IDS), from_folder(config, weights, tmp_path), rtol=1e-4, atol=1e-4)
    assert model.tied == (files in ("tied", "tied by the output rows"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8] if not WITHOUT_KERNELS else [torch.float32])
def test_missing_or_misshapen_weights_are_refused(dtype: torch.dtype) -> None:
    config = Qwen2Config(**{**SMALL, "head_dim": 32}, tie_word_embeddings=False)
    whole = random_weights(config, torch.Generator().manual_seed(0))
    for name in ("lm_head.weight", "model.layers.1.self_attn.k_proj.bias", "model.layers.0.mlp.down_proj.weight"):
        with pytest.raises(ValueError, match=f"the weights do not fit their config.json: {name} is missing"):
            Transformer(config, {other: t for other, t in whole.items() if other != name}, dtype, CPU)
    for name in ("model.layers.1.self_attn.k_proj.bias", "model.norm.weight", "lm_head.weight"):
        with pytest.raises(ValueError, match=rf"{name} is \[.*\], not \["):
            Transformer(config, {**whole, name: whole[name][:-1]}, dtype, CPU)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"{name} is stored as torch.int8; expected weights in floating-point numbers"):
        Transformer(config, {**whole, name: whole[name].to(torch.int8)}, dtype, CPU)


def test_weights_beyond_float16_are_refused_in_float16_only() -> None:
    config = LlamaConfig(**SMALL)
    weights = random_weights(config, torch.Generator().manual_seed(0))
    weights["model.embed_tokens.weight"][3, 3] = -1e5
    with pytest.raises(ValueError, match="the weights reach 1e\\+05, which float16 does not hold"):
        Transformer(config, weights, torch.float16, CPU)
    Transformer(config, weights, torch.bfloat16, CPU)


@torch.inference_mode()
def test_texts_beyond_the_context_are_refused() -> None:
    config = LlamaConfig(**SMALL)
    model = Transformer(config, random_weights(config, torch.Generator().manual_seed(0)), torch.float32, CPU)
    assert len(generate_batch(model, [[1] * (CONTEXT - 1)], 2, ())[0]) == 2  # the last token is not read
    with pytest.raises(ValueError, match="prompts of up to 39 tokens and 3 more do not fit the context of 40"):
        generate_batch(model, [[1], [1] * (CONTEXT - 1)], 3, ())
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate_batch(model, [[1], []], 3, ())
