"""Tensors of a head that nothing reads, or that contradict each other or the configuration, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.models.heads import Recipe, drafted, save_head


def save_changed(folder: Path, change: Any, layout: str = "eagle") -> Path:
    """Save a head, apply a change to its tensors, and return its folder."""
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
            "it does not have the tensors midlayer.self_attn.k_proj.bias",
        ),
        (
            add(**{"midlayer.mlp.up_proj.bias": torch.ones(40)}),
            "it does not have the tensors midlayer.mlp.gate_proj.bias",
        ),
        (drop("norm.weight"), "it does not have the tensors norm.weight"),
        (drop("midlayer.hidden_norm.weight"), "it does not have the tensors midlayer.hidden_norm.weight"),
        (drop("fc.weight"), "it does not have the tensors fc.weight"),
        (drop("d2t"), "it has no d2t, without which 13 draft tokens cannot be mapped to the 16 of the target"),
        (drop("d2t", "t2d"), "it has no d2t"),
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
def test_unread_or_contradicting_tensors_are_refused(
    change: Any, message: str, tiny_target: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        drafted(tiny_target, save_changed(tmp_path, change))
    assert str(tmp_path) in str(caught.value)


def test_harmless_tensors_change_nothing(tiny_target: Path, tmp_path: Path) -> None:
    ones = {"verifier_norm.weight": torch.ones(32), "verifier_lm_head.weight": torch.ones(13, 32)}
    tables = {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    plain = drafted(tiny_target, save_changed(tmp_path / "a", lambda weights: None)).tree.scores
    more = save_changed(tmp_path / "b", add(**ones, **tables))
    np.testing.assert_array_equal(drafted(tiny_target, more).tree.scores, plain)
    without = save_changed(tmp_path / "c", drop("t2d"))  # t2d follows from d2t
    np.testing.assert_array_equal(drafted(tiny_target, without).tree.scores, plain)
