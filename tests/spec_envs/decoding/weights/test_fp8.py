"""Weights in blocks of FP8 are multiplied by their scales when they are loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from tests.support.models.foreign import edit_config, edit_weights, ours, theirs


@pytest.fixture(scope="module")
def fp8_models(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> dict[str, Path]:
    """Return the folders of a model with projections in FP8 with a scale per block, and of the same weights in
    float32."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 16, "head_dim": 64}
    config = Qwen3Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=0
    )
    folders = {name: tmp_path_factory.mktemp(name) for name in ("stored", "meant")}
    stored, meant = {}, {}
    for name, weight in AutoModelForCausalLM.from_config(config).state_dict().items():
        stored[name] = meant[name] = weight
        if name.endswith("_proj.weight"):
            blocks = weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            stored[name] = (blocks / scale).to(torch.float8_e4m3fn).reshape(weight.shape)
            stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
            meant[name] = ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).reshape(weight.shape)
    for name, state in (("stored", stored), ("meant", meant)):
        config.save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(tiny_target).save_pretrained(folders[name])
        save_file(
            {k: v.clone() for k, v in state.items() if k != "lm_head.weight"}, folders[name] / "model.safetensors"
        )
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    edit_config(folders["stored"], quantization_config=method)
    return folders


def test_fp8_blocks_are_scaled(fp8_models: dict[str, Path], tmp_path: Path) -> None:
    assert ours(fp8_models["stored"]) == ours(fp8_models["meant"]) == theirs(fp8_models["meant"])
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    damaged = Path(shutil.copytree(fp8_models["stored"], tmp_path / "damaged"))
    edit_weights(damaged, lambda state: state.update({scale.removesuffix("_inv"): state.pop(scale)}))
    with pytest.raises(ValueError, match=rf"does not read the FP8 weights .*{scale.removesuffix('_inv')}"):
        ours(damaged)


@pytest.mark.parametrize("columns", [192, 320])
def test_incomplete_fp8_blocks_are_refused(fp8_models: dict[str, Path], tmp_path: Path, columns: int) -> None:
    """transformers would divide the weight into other blocks if the last one is incomplete."""
    folder = Path(shutil.copytree(fp8_models["stored"], tmp_path / "cut"))
    name = "model.layers.0.mlp.up_proj.weight"

    def cut(state: dict[str, torch.Tensor]) -> None:
        state[name] = torch.zeros(384, columns).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = torch.ones(3, -(-columns // 128))

    edit_weights(folder, cut)
    with pytest.raises(ValueError, match=rf"the FP8 weight {name} is \[384, {columns}\] with .* which are not whole"):
        ours(folder)
