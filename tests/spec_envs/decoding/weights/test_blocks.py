"""Weights in the blocks of a GGUF file: the numbers that the gguf library reads, in transformers' order of rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from spec_envs.decoding.drafters.draft_model import on_the_target
from spec_envs.decoding.model.transformer import Transformer, fingerprint
from spec_envs.decoding.weights import blocks, checkpoints
from spec_envs.decoding.weights.blocks import Blocks
from spec_envs.decoding.weights.checkpoints import load_draft, load_target, model_folder
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_stored, load_weights
from spec_envs.decoding.weights.gguf_weights import NAMES
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.forwards import text_logits
from tests.support.models.gguf_files import in_blocks, quantised, split, tensors_of, tiny_model, write_gguf
from tests.support.models.tiny import CPU

KINDS = [GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0", "Q5_1")]
MIXED = [KINDS[i] for i in (0, 1, 2, 3, 4, 1, 1)]  # of the embedding, q, k, v, o, gate and up; down as the embedding
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


@pytest.mark.parametrize("tied", [True, False])
def test_model_of_blocks_is_that_of_their_numbers(tied: bool, tmp_path: Path) -> None:
    model = tiny_model(**WIDE, tie_word_embeddings=tied)
    folder = model_folder(str(write_gguf(model, tmp_path / "model.gguf", tensors=in_blocks(model, KINDS))))
    config, stored, weights = load_config(folder), load_stored(folder), load_weights(folder)
    assert fingerprint(stored) == fingerprint(weights)
    ids = torch.tensor([[5, 17, 5]])
    for dtype in ("float32", torch.bfloat16):
        one, other = Transformer(config, stored, dtype, CPU), Transformer(config, weights, dtype, CPU)
        assert torch.equal(text_logits(one, ids), text_logits(other, ids)) and one.dtype == other.dtype
        assert torch.equal(one.output_rows(ids[0]), one.output_weight()[ids[0]])
        assert one.weight_bytes == other.weight_bytes


@pytest.mark.skipif(WITHOUT_KERNELS, reason="needs the compiled kernels")
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_in_blocks_is_exact(tied: bool, tmp_path: Path) -> None:
    """The rows are the numbers of the file, and a draft model of layers only may share them."""
    model = tiny_model(**WIDE, tie_word_embeddings=tied)
    path = write_gguf(model, tmp_path / "model.gguf", tensors=in_blocks(model, MIXED))
    target, weights = load_target(str(path), CPU, "q4"), load_weights(model_folder(str(path)))
    ids = torch.tensor([[3, 250, 0, 3]])
    embedding = weights["model.embed_tokens.weight"]
    assert target.dtype == "q4" and torch.equal(target.embed(ids), embedding[ids])
    assert torch.equal(target.embedding_weight(), embedding)
    assert torch.equal(target.output_rows(ids[0]), weights.get("lm_head.weight", embedding)[ids[0]])
    layer = {name: tensor for name, tensor in weights.items() if ".layers.0." in name or "model.norm" in name}
    config = load_config(model_folder(str(path)))
    config.num_hidden_layers = 1
    draft, shortlist = on_the_target(config, {**layer, "shortlist": torch.arange(7)}, target)
    assert draft.dtype == "int8" and torch.equal(draft.embed(ids), target.embed(ids)) and len(shortlist.ids) == 7


@pytest.mark.skipif(WITHOUT_KERNELS, reason="needs the compiled kernels")
def test_draft_models_of_a_target_in_blocks(tmp_path: Path) -> None:
    model, folder = tiny_model(**WIDE), tmp_path / "folder"
    model.save_pretrained(folder)
    paths = {
        kind: write_gguf(model, tmp_path / f"{kind.name}.gguf", tensors=in_blocks(model, [kind]))
        for kind in (KINDS[0], KINDS[-1])
    }
    target = load_target(str(paths[KINDS[0]]), CPU, "q4")
    up = {"blk.1.ffn_up.weight": in_blocks(model, [KINDS[1]])["blk.1.ffn_up.weight"]}
    mixed = write_gguf(model, tmp_path / "mixed.gguf", tensors=in_blocks(model, [KINDS[0]]) | up)
    drafts = [load_draft(str(name), target).dtype for name in (*paths.values(), mixed, folder)]
    assert drafts == ["q4", "int8", "int8", "int8"]
    with pytest.raises(ValueError, match=r"gate_proj.weight is stored as Q4_0, the other one as Q4_1; pass dtype int8"):
        load_target(str(mixed), CPU, "q4")
    assert load_draft(str(paths[KINDS[0]]), load_target(str(folder), CPU, "float32")).dtype == "float32"


def test_blocks_are_needed_to_compute_in_them(tiny_target: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"'q4' multiplies the blocks of a GGUF file \(Q4_0, .*\), and model.embed_tokens.weight is "
        r"stored as float32; pass dtype int8",
    ):
        load_target(str(tiny_target), CPU, "q4")
    model = tiny_model(**WIDE)
    path = write_gguf(model, tmp_path / "model.gguf", tensors=in_blocks(model, [KINDS[0], KINDS[-1]]))
    with pytest.raises(ValueError, match=r"_proj.weight is stored as Q5_1; pass dtype int8"):
        load_target(str(path), CPU, "q4")


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
