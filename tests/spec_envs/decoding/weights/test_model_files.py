"""Folders in the Hugging Face layout from other sources give the text of transformers, or are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer

from spec_envs.decoding.weights.checkpoints import eos_ids, load_tokenizer
from spec_envs.prompts.sets import load_prompts
from tests.support.models.foreign import edit_config, edit_weights, ours, theirs


@pytest.fixture
def folder(tiny_target: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_target, tmp_path / "model"))


LONG = {"rope_theta": 1e4, "original_max_position_embeddings": 2048, "factor": 4.0}
SAME: dict[str, dict[str, Any]] = {
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "an older config": {
        "rope_parameters": None,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "longrope": {
        "rope_parameters": LONG | {"rope_type": "longrope", "short_factor": [1, 2, 3, 4], "long_factor": [1, 3, 5, 7]},
        "max_position_embeddings": 8192,
    },
    "one factor": {
        "rope_parameters": LONG | {"rope_type": "longrope", "short_factor": [1, 2, 3, 4], "long_factor": [1, 2, 3, 4]}
    },
    "proportional": {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "yarn": {"rope_parameters": LONG | {"rope_type": "yarn", "original_max_position_embeddings": 64}},
    "unknown words": {"unsloth_version": "2025", "logit_scale": None, "pretraining_tp": 2},
}


@pytest.mark.parametrize("name", SAME)
def test_text_equals_transformers(name: str, folder: Path) -> None:
    edit_config(folder, **SAME[name])
    ids = np.random.default_rng(0).integers(1, 16, 120).tolist()
    assert ours(folder, ids) == theirs(folder, ids)


def test_tied_and_untied_weights(folder: Path) -> None:
    """One tensor is used for both; two different ones are not tied, whatever the config states; none is invented."""
    text = ours(folder)
    edit_weights(folder, lambda state: state.update({"lm_head.weight": state.pop("model.embed_tokens.weight")}))
    assert ours(copy(folder, "head alone")) == text == theirs(folder)
    edit_weights(folder, lambda state: state.update({"model.embed_tokens.weight": state["lm_head.weight"].flip(0)}))
    assert (other := ours(copy(folder, "both"))) == theirs(folder) and other != text
    edit_weights(folder, lambda state: state.pop("lm_head.weight"))
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head.weight is missing"):
        ours(copy(folder, "not tied"))


def copy(folder: Path, name: str) -> Path:
    """Return a copy of a folder under another name, because models are loaded once per path."""
    return Path(shutil.copytree(folder, folder.with_name(name)))


def add(**tensors: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return a function that adds tensors."""
    return lambda state: state.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


QUERIES = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda state: state.pop(f"{QUERIES}.weight"), f"{QUERIES}.weight is missing"),
        (
            lambda state: state.update({f"{QUERIES}.weight_scale": torch.ones(1)}),
            f"does not read: {QUERIES}.weight_scale",
        ),
        (lambda state: state.update({f"{QUERIES}.bias": torch.ones(32)}), f"does not read: {QUERIES}.bias"),
        (lambda state: state.update({"model.layers.8.mlp.up_proj.weight": torch.ones(48, 32)}), "layers.8.mlp"),
        (lambda state: state.update({f"{QUERIES}.qweight": torch.ones(4, 32, dtype=torch.int32)}), "qweight .* int32"),
        (
            lambda state: state.update({f"{QUERIES}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)}),
            "float8_e4m3fn",
        ),
        (lambda state: state.update({f"{QUERIES}.weight": torch.ones(32, 32, dtype=torch.int8)}), "is int8"),
        (lambda state: state.update({f"{QUERIES}.lora_A.weight": torch.ones(2, 32)}), "an adapter that was not merged"),
        (lambda state: state.update({"model.embed_tokens.weight": torch.ones(8, 32)}), r"is \[8, 32\], not \[16, 32\]"),
    ],
)
def test_missing_or_unread_tensors_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, folder: Path
) -> None:
    edit_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        ours(folder)


def test_rotary_tables_of_older_versions_are_ignored(folder: Path) -> None:
    text = ours(folder)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(8)}
    edit_weights(folder, lambda state: state.update(old))
    assert ours(copy(folder, "older")) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *[
            ({"quantization_config": {"quant_method": method}}, rf"quantised \(quantization_config: '{method}'\)")
            for method in ("fbgemm_fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4")
        ],
        ({"compression_config": {"format": "naive-quantized"}}, "quantised .*'naive-quantized'"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "is quantised"),
        ({"model_type": "gpt2"}, "supported architectures: llama, mistral"),
        ({"model_type": ["llama"]}, "supported architectures"),
        ({"hidden_size": "abc"}, "config.json .*hidden_size"),
        ({"hidden_size": 0}, "config.json"),
        ({"hidden_size": -32}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_key_value_heads": 3}, "config.json .*multiple"),
        ({"head_dim": 7}, "config.json .*even"),
        ({"vocab_size": None}, "config.json"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_hidden_layers": "8"}, "num_hidden_layers '8'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rms_norm_eps": "1e-5"}, "config.json .*rms_norm_eps"),
        ({"attention_multiplier": 0.2}, "attention_multiplier = 0.2, which is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"is_causal": False}, "is_causal"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "'mrope' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": -1, "factor": 2.0}}, "rope"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1, 2],
                    "long_factor": [1, 2],
                }
            },
            "rope",
        ),
        ({"rope_parameters": "linear"}, "config.json"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "config.json"),
    ],
)
def test_unsupported_configs_are_refused(settings: dict[str, Any], message: str, folder: Path) -> None:
    edit_config(folder, **settings)
    with pytest.raises(ValueError, match=message) as caught:
        ours(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"model_type": "llama", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model_type": "llama", "rms_norm_eps": NaN}',
        b'{"model_type": "llama", "rms_norm_eps": -Infinity}',
        b'{"model_type": "llama", "rms_norm_eps": 1e999}',
        b'{"model_type": "llama", "a": "' + b"a" * (1 << 24) + b'"}',
        "ä".encode("latin-1"),
    ],
    ids=["empty", "cut", "list", "null", "deep", "nan", "infinity", "overflow", "large", "latin-1"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_damaged_json_is_refused(content: bytes, name: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read .*{name}") as caught:
        ours(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_text_ends_at_every_end_token(folder: Path) -> None:
    """Texts end at all end tokens of the config, the generation config and the tokenizer."""
    text = ours(folder)
    stop = text[6]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, stop, 99]}))
    assert eos_ids(str(listed := copy(folder, "listed"))) == {0, stop}
    assert ours(listed) == theirs(listed) == text[: text.index(stop) + 1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": {"a": 1}}))
    with pytest.raises(ValueError, match=r"eos_token_id is {'a': 1} in .*expected an id or a list of ids"):
        ours(copy(folder, "damaged"))


def test_no_code_of_a_model_is_executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a question ask whether the code may be executed."""
    text = ours(folder)
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (folder / "evil.py").write_text("raise SystemExit('this must not run')")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": auto_map}))
    edit_config(folder, auto_map=auto_map)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    try:
        assert ours(copy(folder, "mapped")) == text
    except ValueError as error:
        assert "\n" not in str(error)


def test_ids_outside_the_embedding_are_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # a token that no prompt contains
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) == 17 and ours(folder)
    with pytest.raises(ValueError, match="the prompt has the id 16; expected ids of the target, 0 to 15"):
        ours(folder, tokenizer.encode("the <pad> of"))
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has ids \(17\) that the model's 16 rows do not reach"):
        ours(copy(folder, "added"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.fuzz
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(
    name: str, share: float, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(tiny_target, tmp_path_factory.mktemp("cut") / "model"))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    try:
        assert ours(folder) == ours(tiny_target)  # only trailing white space was cut off
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_or_missing_tokenizers_are_refused(name: str, folder: Path) -> None:
    for content in (b"[1]", b"{}", b'{"a": ' * 10_000, b'{"model": {"type": "BPE", "vocab": 3}}', b"\xff"):
        (folder / name).write_bytes(content)
        damaged = copy(folder, f"{name}-{len(content)}")
        try:
            assert load_tokenizer(str(damaged)).encode("the a") == [2, 3]
        except ValueError as error:
            assert str(damaged) in str(error) and "\n" not in str(error)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="cannot read the tokenizer of"):
        load_tokenizer(str(folder))


def test_invalid_torch_files_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    content = (folder / "pytorch_model.bin").read_bytes()
    for end in (0, 1, 100, len(content) // 2, len(content) - 1):
        (folder / "pytorch_model.bin").write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"cannot read the weights .*pytorch_model.bin") as caught:
            ours(folder)
        assert "\n" not in str(caught.value)
    for held in ([1, 2], {"state_dict": state}, torch.ones(2), {"a": 1}):
        torch.save(held, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="holds something else than tensors by name"):
            ours(folder)


def test_adapter_beside_the_weights_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_target, tmp_path / "model"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter .*; merge it into them"):
        ours(folder)


def test_ignored_generation_settings_are_logged(
    tiny_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers applies these settings by default; a text here is the model's own."""
    folder = Path(shutil.copytree(tiny_target, tmp_path / "model"))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 0, "repetition_penalty": 1.3, "num_beams": 1, "no_repeat_ngram_size": 2})
    )
    assert ours(folder) == ours(tiny_target)
    [logged] = caplog.messages
    assert (
        "texts are the model's own, without no_repeat_ngram_size = 2, repetition_penalty = 1.3 of its files" in logged
    )


def test_tokenizer_that_fails_in_use_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_target, tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "a"}))
    with pytest.raises(ValueError, match="cannot read the tokenizer of"):
        ours(folder)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "a" * 5000])
def test_names_invalid_in_any_file_system_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^no model '.{10,220}: expected a name of models.yml"):
        ours(Path(name))
    with pytest.raises(ValueError):
        load_prompts("all", "all", name)
