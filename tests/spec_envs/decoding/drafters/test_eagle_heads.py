"""Published EAGLE-3 heads: whatever layout, flags and layers, they draft what they were trained to, or are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.loading import drafts_chains, load_decoder
from tests.conftest import WITHOUT_KERNELS
from tests.support.heads import LAYOUTS, Recipe, assert_drafts_as_computed, config, drafted, random_target, save_head

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
IDS = "eagle_aux_hidden_state_layer_ids"
RECIPES = {
    "plain": Recipe(),
    "residual": Recipe(flags={"norm_before_residual": True}),
    "before-fc": Recipe(flags={"norm_before_fc": True}),
    "3.1": Recipe(flags={"fc_norm": True, "norm_output": True}),
    "last": Recipe(boundaries=(3, 6, 8)),
    "four": Recipe(boundaries=(2, 4, 5, 8), flags={"fc_norm": True}),
    "one": Recipe(boundaries=(8,)),
    "deep": Recipe(layers=3, flags={"norm_before_residual": True}),
    "biased": Recipe(attention_bias=True, out_bias=True, mlp_bias=True, fc_bias=True),
    "embedding": Recipe(embedding=True),
    "narrow": Recipe(hidden=24, head_dim=6, embedding=True, flags={"fc_norm": True}),
    "qwen3": Recipe(head_norms=True, layers=2, attention_bias=True),
    "no-rows": Recipe(output_rows=False),
    "whole": Recipe(drafted=16, output_rows=False),
    "all-rows": Recipe(drafted=16),
    "theta": Recipe(theta=77.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RECIPES)
def test_heads_of_every_layout(name: str, layout: str, tiny_target: Path, tmp_path: Path) -> None:
    r = RECIPES[name]
    assert_drafts_as_computed(tiny_target, tmp_path, r, save_head(tmp_path, r, layout))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    hidden, flags = draw(st.sampled_from([32, 16])), {f: draw(st.booleans()) for f in FLAGS}
    flags["fc_norm"] = flags["fc_norm"] and not flags["norm_before_fc"]
    kv = draw(st.sampled_from([1, 2, 4]))
    boundaries = draw(st.lists(st.integers(0, 8), min_size=1, max_size=5, unique=True).map(sorted))
    return Recipe(
        hidden=hidden,
        layers=draw(st.integers(1, 3)),
        kv_heads=kv,
        heads=kv * draw(st.sampled_from([1, 2, 4])),
        head_dim=draw(st.sampled_from([2, 4, 8, 12])),
        mlp=draw(st.integers(1, 50)),
        drafted=draw(st.integers(4, 16)),
        boundaries=tuple(boundaries),
        embedding=draw(st.booleans()) or hidden != 32,
        output_rows=draw(st.booleans()) or hidden != 32,
        theta=draw(st.floats(2, 1e6)),
        seed=draw(st.integers(0, 99)),
        flags=flags,
        **{b: draw(st.booleans()) for b in ("attention_bias", "out_bias", "mlp_bias", "fc_bias", "head_norms")},
    )


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(r=recipes(), layout=st.sampled_from(LAYOUTS))
def test_any_head_drafts_what_it_computes(
    r: Recipe, layout: str, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assume(layout == "speculators" or r.boundaries[0] != 1)  # there is no way to write these
    folder = tmp_path_factory.mktemp("head")
    assert_drafts_as_computed(tiny_target, folder, r, save_head(folder, r, layout))


def read_layers(target: Path, folder: Path, **changes: Any) -> tuple[int, ...]:
    """Of a head whose config.json names layers, the boundaries that are read."""
    save_head(folder, Recipe(named=False), **changes)
    return drafted(target, folder).local.capture


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({}, (2, 4, 5)),
        ({"eagle_config": None}, (2, 4, 5)),
        ({"eagle_config": {IDS: []}}, (2, 4, 5)),
        ({"eagle_config": {IDS: [1, 3, 4]}}, (2, 4, 5)),  # outputs, as SpecForge and ModelOpt write them
        ({"eagle_config": {IDS: [2, 4, 5]}}, (2, 4, 5)),
        ({"eagle_config": {IDS: [1, 5, 7]}}, (2, 6, 8)),
        ({"eagle_config": {IDS: [0, 4, 8]}}, (0, 4, 8)),
        ({IDS: [2, 4, 8]}, (2, 4, 8)),
        ({IDS: [1, 3, 4], "eagle_config": {IDS: [1, 3, 4]}}, (2, 4, 5)),
    ],
)
def test_layers_are_counted_as_their_tools_do(changes: dict, read: tuple, tiny_target: Path, tmp_path: Path) -> None:
    assert read_layers(tiny_target, tmp_path, **changes) == read


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({IDS: [1, 3, 4]}, "takes for inputs and the tools that train for outputs; write .2, 4, 5."),
        ({IDS: [2, 4, 9]}, r"boundaries \[2, 4, 9\] of a target's layers, but the target has 8"),
        ({"eagle_config": {IDS: [1, 3, 8]}}, r"boundaries \[2, 4, 9\]"),
        ({IDS: [2, 4, 5, 6]}, r"fc.weight is \(32, 96\), but \(32, 128\) would fit"),
        ({IDS: [4, 2, 5]}, "expected ascending"),
        ({IDS: [2, 2, 5]}, "expected ascending"),
        ({IDS: [-1, 2, 5]}, ">= 0"),
        ({IDS: ["2", "4", "5"]}, "Expected `int`, got `str`"),
        ({IDS: [2.0, 4.0, 5.5]}, "Expected `int`"),
        ({IDS: "2,4,5"}, "Expected `array`"),
        ({IDS: [2, 4, 5], "eagle_config": {IDS: [2, 4, 6]}}, r"is \[2, 4, 5\], but \[2, 4, 6\] in eagle_config"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states is 4, but 3 layers are read"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is False, which is not computed"),
        ({"eagle_config": {"use_last_layernorm": False}}, "use_last_layernorm is False"),
        (
            {"eagle_config": {"use_input_layernorm_in_first_layer": False}},
            "use_input_layernorm_in_first_layer is False",
        ),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "use_mtp_layernorm is True"),
        ({"eagle_config": {"parallel_draft_step": 4}}, "parallel_draft_step is 4"),
        ({"eagle_config": {"norm_everything": True}}, "eagle_config: norm_everything is True, a key that is not known"),
        ({"eagle_config": [1]}, "eagle_config is .1., expected an object"),
        ({"norm_between": True}, "norm_between is True, a key that is not known here"),
        ({"residual_scale": 0.5}, "residual_scale is 0.5, a key that is not known here"),
        ({"norm_before_residual": "yes"}, "Expected `bool | null`, got `str` - at `\\$.norm_before_residual`"),
        ({"norm_before_fc": True}, "it lacks the tensors input_norm.weight"),
        ({"fc_norm": True}, "it lacks the tensors fc_norm.0.weight, fc_norm.1.weight, fc_norm.2.weight"),
        ({"use_aux_norm": True}, "it lacks the tensors fc_norm.0.weight"),
        ({"norm_before_fc": True, "fc_norm": True}, "both true"),
        (
            {"norm_output": True, "eagle_config": {"norm_output": False}},
            "norm_output is True, but False in eagle_config",
        ),
        ({"attention_bias": True}, "it lacks the tensors midlayer.self_attn.k_proj.bias"),
        ({"mlp_bias": True}, "it lacks the tensors midlayer.mlp.down_proj.bias"),
        ({"bias": True}, "it lacks the tensors fc.bias"),
        ({"num_hidden_layers": 2}, "it lacks the tensors layers.1"),
        ({"hidden_act": "gelu"}, "hidden_act is .gelu."),
        ({"hidden_size": 48}, r"fc.weight is \(32, 96\), but \(48, 144\) would fit config.json"),
        ({"hidden_size": 1 << 30}, "hidden_size"),
        ({"intermediate_size": 1 << 20}, "would fit config.json"),
        ({"target_hidden_size": 48}, r"fc.weight is \(32, 96\), but \(32, 144\)"),
        ({"num_attention_heads": 3}, "attention heads"),
        ({"vocab_size": 24}, "t2d is not the mask"),
        ({"draft_vocab_size": 12}, "draft_vocab_size are 12, but 13"),
        ({"model_type": "llama4_text"}, "model_type is 'llama4_text', expected one of llama"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not computed; expected 1"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta is 10000.0, but 5.0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"logit_scale": 0.25}, "logit_scale is 0.25"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    changes: dict, message: str, tiny_target: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_layers(tiny_target, tmp_path, **changes)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["use_cache", "pruned_heads", "_commit_hash", "unsloth_version", "temperature", "new_switch"]
)
def test_keys_that_change_nothing(key: str, tiny_target: Path, tmp_path: Path) -> None:
    values = {"pruned_heads": {}, "new_switch": False, "temperature": 0.6}
    read_layers(tiny_target, tmp_path, **{key: values.get(key, "1")})


def changed(folder: Path, change: Any, layout: str = "eagle") -> Path:
    """A head with another set of tensors."""
    save_head(folder, Recipe(), layout)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


def add(**tensors: torch.Tensor) -> Any:
    return lambda weights: weights.update(tensors)


def drop(*names: str) -> Any:
    return lambda weights: [weights.pop(name) for name in names]


def set_to(name: str, index: Any, value: Any) -> Any:
    return lambda weights: weights[name].__setitem__(index, value)


EYE = torch.eye(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add(extra=EYE), "nothing reads the tensors extra; they may change"),
        (add(**{"midlayer.mlp.router.weight": EYE}), "nothing reads the tensors midlayer.mlp.router.weight"),
        (add(**{"lm_head.bias": EYE[0, :13].clone()}), "nothing reads the tensors lm_head.bias"),
        (
            add(**{"layers.0.input_layernorm.weight": EYE[0].clone()}),
            "two tensors are called midlayer.input_layernorm.weight",
        ),
        (add(**{"layers.1.input_layernorm.weight": EYE[0].clone()}), "nothing reads the tensors layers.1.input"),
        (add(**{"input_norm.weight": torch.ones(96)}), "nothing reads the tensors input_norm.weight"),
        (add(**{"fc_norm.0.weight": torch.ones(32)}), "nothing reads the tensors fc_norm.0.weight"),
        (add(**{"fc.weight_scale": torch.ones(1)}), "nothing reads the tensors fc.weight_scale"),
        (
            add(**{"midlayer.self_attn.q_proj.bias": torch.ones(32)}),
            "it lacks the tensors midlayer.self_attn.k_proj.bias",
        ),
        (add(**{"midlayer.mlp.up_proj.bias": torch.ones(40)}), "it lacks the tensors midlayer.mlp.gate_proj.bias"),
        (drop("norm.weight"), "it lacks the tensors norm.weight"),
        (drop("midlayer.hidden_norm.weight"), "it lacks the tensors midlayer.hidden_norm.weight"),
        (drop("fc.weight"), "it lacks the tensors fc.weight"),
        (drop("d2t"), "it lacks d2t, without which 13 draft tokens cannot be told from 16"),
        (drop("d2t", "t2d"), "it lacks d2t"),
        (add(d2t=torch.zeros(12, dtype=torch.long)), "13, but 12 tokens can be drafted"),
        (add(d2t=torch.zeros(13)), "d2t is torch.float32 of shape"),
        (add(d2t=torch.zeros(13, 1, dtype=torch.long)), "d2t is torch.int64 of shape"),
        (set_to("d2t", 12, 9), "d2t leads to ids outside of the target's 16"),
        (set_to("d2t", 0, -1), "d2t leads to ids outside"),
        (set_to("d2t", 1, -1), "d2t leads to one id twice|t2d is not the mask"),
        (set_to("t2d", slice(None), True), "t2d is not the mask of the 13 ids"),
        (add(t2d=torch.ones(15, dtype=torch.bool)), "t2d is not the mask"),
        (set_to("fc.weight", (0, 0), torch.nan), "fc.weight holds numbers that are not finite"),
        (add(**{"fc.weight": torch.ones(32, 96, dtype=torch.int8)}), "fc.weight.* is (in torch.)?int8"),
        (add(**{"lm_head.weight": torch.ones(14, 32)}), "14, but 13 tokens can be drafted"),
        (add(**{"embed_tokens.weight": torch.ones(15, 32)}), r"embed_tokens.weight is \(15, 32\)"),
    ],
)
def test_tensors_that_nobody_reads_or_that_contradict_are_refused(
    change: Any, message: str, tiny_target: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        drafted(tiny_target, changed(tmp_path, change))
    assert str(tmp_path) in str(caught.value)


def test_tensors_that_change_nothing(tiny_target: Path, tmp_path: Path) -> None:
    ones = {"verifier_norm.weight": torch.ones(32), "verifier_lm_head.weight": torch.ones(13, 32)}
    tables = {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    plain = drafted(tiny_target, changed(tmp_path / "a", lambda weights: None)).tree.scores
    more = changed(tmp_path / "b", add(**ones, **tables))
    np.testing.assert_array_equal(drafted(tiny_target, more).tree.scores, plain)
    without = changed(tmp_path / "c", drop("t2d"))  # it follows from d2t
    np.testing.assert_array_equal(drafted(tiny_target, without).tree.scores, plain)


@pytest.mark.parametrize(
    ("changes", "tensors", "what"),
    [
        ({"medusa_num_heads": 4}, {}, "a Medusa head"),
        ({"architectures": ["MedusaModel"]}, {}, "a Medusa head"),
        ({"architectures": ["DeepSeekMTPModel"]}, {}, "a multi-token prediction"),
        ({"architectures": ["LlamaForCausalLMNextN"]}, {}, "a multi-token prediction"),
        ({"model_type": "qwen3_next_mtp"}, {}, "a multi-token prediction"),
        ({"architectures": ["MLPSpeculatorPreTrainedModel"]}, {}, "an MLP speculator"),
        ({"architectures": ["PEagleDraftModel"]}, {}, "a P-EAGLE head"),
        ({"parallel_drafting": True, "architectures": ["LlamaForCausalLMEagle3"]}, {}, "a P-EAGLE head"),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {}}, {}, "a DFlash drafter"),
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, {}, "an EAGLE-3 head with multi-head latent attention"),
        ({"speculators_model_type": "dflash"}, {}, "a 'dflash' drafter of speculators"),
        ({"speculators_model_type": "eagle"}, {}, "a 'eagle' drafter of speculators"),
        ({"architectures": ["LlamaForCausalLMEagle"]}, {}, "an EAGLE-1, EAGLE-2 or HASS head"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            {"fc.weight": (32, 64), "fc.bias": (32,)},
            "an EAGLE-1, EAGLE-2 or HASS head",
        ),
        (
            {"draft_vocab_size": 13},
            {"fc.weight": (32, 64), "embed_tokens.weight": (16, 32)},
            "an EAGLE-1, EAGLE-2 or HASS",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, {"0.0.linear.weight": (32, 32)}, "a Medusa head"),
        ({"architectures": ["LlamaForCausalLM"]}, {"mtp.fc.weight": (32, 64)}, "a multi-token prediction"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            {"model.layers.0.eh_proj.weight": (32, 64)},
            "a multi-token prediction",
        ),
    ],
)
def test_other_formats_are_called_by_their_names(
    changes: dict, tensors: dict, what: str, tiny_target: Path, tmp_path: Path
) -> None:
    written = {key: value for key, value in config(Recipe(named=False), "eagle").items() if key != "draft_vocab_size"}
    (tmp_path / "config.json").write_text(json.dumps(written | {"architectures": None} | changes))
    save_file(
        {name: torch.ones(size) for name, size in (tensors or {"x": (1,)}).items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        ValueError, match=f"holds {what}.*which is not read; read are EAGLE-3 heads .* and draft models"
    ):
        load_decoder(str(tiny_target), str(tmp_path), "cpu", "float32", width=1)


def test_folders_that_are_damaged_or_belong_to_another_target(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    def refused(head: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_decoder(str(tiny_target), str(head), "cpu", "float32", width=1)
        assert str(head) in str(caught.value)

    save_head(tmp_path / "wide", Recipe(target_hidden=48, hidden=48, head_dim=12))
    refused(tmp_path / "wide", "hidden size is 48, the target's is 32; use a head trained for this target")
    save_head(tmp_path / "vocab", Recipe(vocab=20))
    refused(tmp_path / "vocab", "vocabulary is 20, the target's is 16")
    save_head(tmp_path / "narrow", Recipe(hidden=16))
    refused(tmp_path / "narrow", "hidden size is 16, the target's is 32, so it needs embed_tokens.weight")
    verifier = {"algorithm": "eagle3", "verifier": {"name_or_path": "org/its-target"}}
    save_head(tmp_path / "named", Recipe(vocab=20), "speculators", speculators_config=verifier)
    refused(tmp_path / "named", r"the target's is 16; .*\(it names org/its-target\)")
    save_head(tmp_path / "unsaid", Recipe(), "speculators", norm_before_residual=None)
    refused(tmp_path / "unsaid", "norm_before_residual is not said, and tools disagree")
    save_head(tmp_path / "other", Recipe(), "speculators", speculators_config={"algorithm": "dflash"})
    refused(tmp_path / "other", "algorithm is 'dflash'")
    save_head(tmp_path / "inner", Recipe(), "speculators", transformer_layer_config={"model_type": "gemma3"})
    refused(tmp_path / "inner", "model_type 'gemma3', expected one of llama, qwen3")
    save_head(tmp_path / "adapted", Recipe())
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapted", "adapter beside it, which is not read")
    save_head(tmp_path / "cut", Recipe())
    data = (tmp_path / "cut" / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (tmp_path / "cut" / "model.safetensors").write_bytes(data[:size])
        refused(tmp_path / "cut", "cannot read the weights .*model.safetensors")
    (tmp_path / "cut" / "model.safetensors").unlink()
    refused(tmp_path / "cut", "holds no weights")
    for text in ("", "[]", "{", '{"a": ' * 100_000, "\xff"):
        (tmp_path / "cut" / "config.json").write_bytes(text.encode("latin-1"))
        refused(tmp_path / "cut", "config.json of the drafter")
    (tmp_path / "cut" / "config.json").unlink()
    refused(tmp_path / "cut", "has no config.json")
    assert not drafts_chains(str(tmp_path / "wide")) and drafts_chains(str(tiny_draft))


def test_a_head_is_as_it_was_when_it_is_saved_again(tiny_target: Path, tmp_path: Path) -> None:
    for i, (r, layout) in enumerate((r, layout) for r in RECIPES.values() for layout in ("modelopt", "speculators")):
        made = save_head(tmp_path / f"{i}", r, layout)
        EagleHead.load(str(tmp_path / f"{i}")).save(tmp_path / f"{i}-again", torch.float32)
        assert_drafts_as_computed(tiny_target, tmp_path / f"{i}-again", r, made)
    save_head(tmp_path / "first", Recipe(boundaries=(1, 4, 5)), "speculators")
    with pytest.raises(ValueError, match="would be read as outputs"):
        EagleHead.load(str(tmp_path / "first")).save(tmp_path / "second")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_head_with_any_config_is_loaded_or_refused_in_a_sentence(
    data: st.DataObject, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, layout = tmp_path_factory.mktemp("head"), data.draw(st.sampled_from(LAYOUTS))
    save_head(folder, Recipe(), layout)
    written = json.loads((folder / "config.json").read_text())
    place = written
    inner = [value for value in written.values() if isinstance(value, dict)]
    if inner and data.draw(st.booleans()):
        place = data.draw(st.sampled_from(inner))
    known = [
        *place,
        IDS,
        *FLAGS,
        "rope_scaling",
        "rope_parameters",
        "draft_vocab_size",
        "sliding_window",
        "layer_types",
    ]
    for key in data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=3)):
        place[key] = data.draw(JUNK, label=key)
    (folder / "config.json").write_text(json.dumps(written))
    try:
        decoder = drafted(tiny_target, folder, levels=2)
        while not decoder.finished:
            decoder.cycle(2)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


@pytest.fixture(scope="module")
def wide_target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose widths the kernels compute."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    return random_target(tmp_path_factory.mktemp("wide") / "target", tiny_target, **sizes)


@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
@pytest.mark.parametrize("name", RECIPES)
def test_int8_drafts_nearly_the_same(name: str, wide_target: Path, tmp_path: Path) -> None:
    """Under every flag, but for what rounding does."""
    r = dataclasses.replace(RECIPES[name], target_hidden=128, hidden=128, head_dim=32, mlp=128, scale=0.08)
    r = dataclasses.replace(r, hidden=64) if name == "narrow" else r
    save_head(tmp_path / "head", r)
    exact, coarse = (drafted(wide_target, tmp_path / "head", d, width=13, levels=2) for d in ("float32", "int8"))
    assert exact.tokens == coarse.tokens
    first = [dict(zip(d.tree.tokens[:13].tolist(), d.tree.scores[:13], strict=True)) for d in (exact, coarse)]
    shared = sorted(first[0].keys() & first[1].keys())
    assert len(shared) > 10
    scores = [[found[token] for token in shared] for found in first]
    assert np.corrcoef(scores)[0, 1] > 0.995
    entropies = [np.concatenate(d.tree.entropies) for d in (exact, coarse)]
    assert np.abs(entropies[0] - entropies[1])[0] < 0.15


def test_by_itself_no_dtype_is_taken_that_does_not_compute_the_head(wide_target: Path, tmp_path: Path) -> None:
    save_head(tmp_path, Recipe(target_hidden=128, hidden=24, head_dim=6, embedding=True))
    assert drafted(wide_target, tmp_path, "auto").dtype != "int8"
