"""Configurations of EAGLE-3 heads: the layers they read, and refusal of all that is not computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.loading import load_decoder
from tests.support.models.heads import (
    FLAGS,
    IDS,
    LAYOUTS,
    Recipe,
    config,
    drafted,
    save_head,
)


def read_layers(target: Path, folder: Path, **changes: Any) -> tuple[int, ...]:
    """Return the layer boundaries that are read for a head with these changes to its config.json."""
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
def test_layer_ids_are_read_as_their_tools_write_them(
    changes: dict, read: tuple, tiny_target: Path, tmp_path: Path
) -> None:
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
        ({"eagle_config": "q" * 100_000}, "eagle_config is 'q+[.]{3}$"),
        ({"norm_between": True}, "norm_between is True, a key that is not known here"),
        ({"residual_scale": 0.5}, "residual_scale is 0.5, a key that is not known here"),
        ({"norm_before_residual": "yes"}, "Expected `bool | null`, got `str` - at `\\$.norm_before_residual`"),
        ({"norm_before_fc": True}, "it does not have the tensors input_norm.weight"),
        ({"fc_norm": True}, "it does not have the tensors fc_norm.0.weight, fc_norm.1.weight, fc_norm.2.weight"),
        ({"use_aux_norm": True}, "it does not have the tensors fc_norm.0.weight"),
        ({"norm_before_fc": True, "fc_norm": True}, "both true"),
        (
            {"norm_output": True, "eagle_config": {"norm_output": False}},
            "norm_output is True, but False in eagle_config",
        ),
        ({"attention_bias": True}, "it does not have the tensors midlayer.self_attn.k_proj.bias"),
        ({"mlp_bias": True}, "it does not have the tensors midlayer.mlp.down_proj.bias"),
        ({"bias": True}, "it does not have the tensors fc.bias"),
        ({"num_hidden_layers": 2}, "it does not have the tensors layers.1"),
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
        ({"parallel_drafting": True}, "parallel_drafting is true, but none of mask_token_id, ptd_token_id, pard_token"),
        ({"ptd_token_id": 3}, "it does not have the tensors mask_hidden"),
        ({"pard_token": 16}, "mask_token_id is 16, expected a token below 16"),
        ({"mask_token_id": 3, "pard_token": 4}, "mask_token_id is 3 and pard_token 4"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    changes: dict, message: str, tiny_target: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_layers(tiny_target, tmp_path, **changes)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["use_cache", "pruned_heads", "_commit_hash", "unsloth_version", "temperature", "new_switch"]
)
def test_harmless_keys_are_accepted(key: str, tiny_target: Path, tmp_path: Path) -> None:
    values = {"pruned_heads": {}, "new_switch": False, "temperature": 0.6}
    read_layers(tiny_target, tmp_path, **{key: values.get(key, "1")})


@pytest.mark.parametrize(
    ("changes", "tensors", "what"),
    [
        ({"medusa_num_heads": 4}, {}, "a Medusa head"),
        ({"architectures": ["MedusaModel"]}, {}, "a Medusa head"),
        ({"architectures": ["DeepSeekMTPModel"]}, {}, "a multi-token prediction"),
        ({"architectures": ["LlamaForCausalLMNextN"]}, {}, "a multi-token prediction"),
        ({"model_type": "qwen3_next_mtp"}, {}, "a multi-token prediction"),
        ({"architectures": ["MLPSpeculatorPreTrainedModel"]}, {}, "an MLP speculator"),
        ({"architectures": ["DFlash2DraftModel"], "dflash_config": {}}, {}, "a DFlash 2 drafter"),
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, {}, "an EAGLE-3 head with multi-head latent attention"),
        ({"speculators_model_type": "dspark"}, {}, "a 'dspark' drafter of speculators"),
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
def test_other_formats_are_refused_by_name(
    changes: dict, tensors: dict, what: str, tiny_target: Path, tmp_path: Path
) -> None:
    written = {key: value for key, value in config(Recipe(named=False), "eagle").items() if key != "draft_vocab_size"}
    (tmp_path / "config.json").write_text(json.dumps(written | {"architectures": None} | changes))
    save_file(
        {name: torch.ones(size) for name, size in (tensors or {"x": (1,)}).items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        ValueError,
        match=f"holds {what}.*which is not read; read are EAGLE-3 and P-EAGLE heads .*DFlash drafters .* and draft models",
    ):
        load_decoder(str(tiny_target), str(tmp_path), "cpu", "float32", width=1)


def test_damaged_heads_and_heads_of_other_targets_are_refused(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    def assert_refused(head: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_decoder(str(tiny_target), str(head), "cpu", "float32", width=1)
        assert str(head) in str(caught.value)

    save_head(tmp_path / "wide", Recipe(target_hidden=48, hidden=48, head_dim=12))
    assert_refused(tmp_path / "wide", "hidden size is 48, the target's is 32; use a head trained for this target")
    save_head(tmp_path / "vocab", Recipe(vocab=20))
    assert_refused(tmp_path / "vocab", "vocabulary is 20, the target's is 16")
    save_head(tmp_path / "narrow", Recipe(hidden=16))
    assert_refused(
        tmp_path / "narrow", "hidden size is 16, the target's is 32, so it needs its own embed_tokens.weight"
    )
    verifier = {"algorithm": "eagle3", "verifier": {"name_or_path": "org/its-target"}}
    save_head(tmp_path / "named", Recipe(vocab=20), "speculators", speculators_config=verifier)
    assert_refused(tmp_path / "named", r"the target's is 16; .*\(it names org/its-target\)")
    save_head(tmp_path / "unsaid", Recipe(), "speculators", norm_before_residual=None)
    assert_refused(tmp_path / "unsaid", "norm_before_residual is missing, and tools disagree")
    save_head(tmp_path / "other", Recipe(), "speculators", speculators_config={"algorithm": "dflash"})
    assert_refused(tmp_path / "other", "algorithm is 'dflash'")
    save_head(tmp_path / "inner", Recipe(), "speculators", transformer_layer_config={"model_type": "gemma3"})
    assert_refused(tmp_path / "inner", "model_type 'gemma3', expected one of llama, qwen3")
    save_head(tmp_path / "adapted", Recipe())
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    assert_refused(tmp_path / "adapted", "adapter beside it, which is not read")
    save_head(tmp_path / "cut", Recipe())
    data = (tmp_path / "cut" / "model.safetensors").read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        (tmp_path / "cut" / "model.safetensors").write_bytes(data[:size])
        assert_refused(tmp_path / "cut", "cannot read the weights .*model.safetensors")
    (tmp_path / "cut" / "model.safetensors").unlink()
    assert_refused(tmp_path / "cut", "holds no weights")
    for text in ("", "[]", "{", '{"a": ' * 100_000, "\xff"):
        (tmp_path / "cut" / "config.json").write_bytes(text.encode("latin-1"))
        assert_refused(tmp_path / "cut", "config.json of the drafter")
    (tmp_path / "cut" / "config.json").unlink()
    assert_refused(tmp_path / "cut", "has no config.json")
    assert not DrafterName.parse(str(tmp_path / "wide")).chain and DrafterName.parse(str(tiny_draft)).chain


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config_is_loaded_or_refused_in_one_sentence(
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
