"""Weights in the blocks of a GGUF file: the numbers that the gguf library reads, in transformers' order of rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from spec_envs.decoding.weights import blocks, checkpoints
from spec_envs.decoding.weights.blocks import Blocks
from spec_envs.decoding.weights.checkpoints import model_folder
from spec_envs.decoding.weights.files import load_stored, load_weights
from spec_envs.decoding.weights.gguf_weights import NAMES
from tests.support.models.gguf_files import in_blocks, quantised, split, tensors_of, tiny_model, write_gguf

KINDS = [GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0", "Q5_1")]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(checkpoints, "CACHE", folder)
    return folder


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_numbers_are_those_of_the_library(kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "GROUP", 7)  # so that groups end within rows, and the last one is not full
    weight = quantised(np.random.default_rng(0).normal(size=(24, 512)).astype(np.float32), kind)
    expected = torch.from_numpy(quants.dequantize(weight.data.numpy(), kind))
    assert weight.shape == expected.shape == (24, 512)
    assert torch.equal(weight.dense(), expected)
    ids = torch.tensor([[3, 3], [23, 0]])
    assert torch.equal(weight.rows(ids), expected[ids])
    order = torch.randperm(24)
    assert torch.equal(weight.take(order).dense(), expected[order])


def test_neighbours_of_one_kind_are_joined() -> None:
    arrays = np.random.default_rng(0).normal(size=(4, 8, 256)).astype(np.float32)
    parts = [quantised(array, KINDS[kind]) for array, kind in zip(arrays, (0, 0, 1, 0), strict=True)]
    joined = Blocks.joined(parts)
    assert [(part.kind, len(part.data)) for part in joined] == [(KINDS[0], 16), (KINDS[1], 8), (KINDS[0], 8)]
    assert torch.equal(torch.cat([p.dense() for p in joined]), torch.cat([p.dense() for p in parts]))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_of_a_folder(family: str, tmp_path: Path) -> None:
    """Rows of a Llama's queries and keys are in transformers' order, blocks stay blocks, and floats stay as stored."""
    model = tiny_model(family, **WIDE)
    tensors: dict[str, Any] = in_blocks(model, KINDS)
    half = tensors_of(model)["blk.1.ffn_down.weight"].astype(np.float16)
    folder = model_folder(
        str(write_gguf(model, tmp_path / "model.gguf", tensors=tensors | {"blk.1.ffn_down.weight": half}))
    )
    assert not list(folder.glob("*.safetensors"))
    stored, weights = load_stored(folder), load_weights(folder)
    assert stored.keys() == weights.keys()
    assert isinstance(down := stored["model.layers.1.mlp.down_proj.weight"], torch.Tensor)
    assert torch.equal(down, torch.from_numpy(half))
    for name, there in {
        f"model.layers.0.{here}.weight": f"blk.0.{there}.weight" for there, here in NAMES.items()
    }.items():
        weight = stored[name]
        if "norm" in name:
            assert isinstance(weight, torch.Tensor) and torch.equal(weights[name], model.state_dict()[name])
            continue
        assert isinstance(weight, Blocks) and weight.kind == tensors[there].kind
        expected = tensors[there].dense()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):  # pairs side by side to two halves of a head
            expected = torch.cat([head[part::2] for head in expected.split(64) for part in (0, 1)])
        assert torch.equal(weight.dense(), expected) and torch.equal(weights[name], expected)
        assert weights[name].dtype == torch.float32


@pytest.mark.parametrize("count", [1, 2])
def test_moved_or_changed_files(count: int, tmp_path: Path, cache: Path) -> None:
    """The file by its name is converted again; the folder by its name is refused."""
    paths = split(tiny_model(), tmp_path, count) if count > 1 else [write_gguf(tiny_model(), tmp_path / "model.gguf")]
    folder = model_folder(str(paths[0]))
    os.utime(paths[-1], ns=(0, 10**18))
    with pytest.raises(ValueError, match=r"was made from .*model.*gguf, which was changed since; name the GGUF file"):
        load_weights(folder)
    again = model_folder(str(paths[0]))
    assert again != folder and load_weights(again)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = [path.rename(elsewhere / path.name) for path in paths]
    with pytest.raises(ValueError, match=r"was made from .*model.*gguf, which is not there any more; name the GGUF"):
        load_stored(again)
    assert load_weights(model_folder(str(moved[0])))
