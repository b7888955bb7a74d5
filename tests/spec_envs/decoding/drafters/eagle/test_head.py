"""Published EAGLE-3 heads draft what they were trained to, whatever their layout, flags and layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from spec_envs.decoding.drafters.eagle.config import Variant
from spec_envs.decoding.drafters.eagle.head import PLAIN, EagleHead
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_target
from spec_envs.decoding.weights.files import load_weights
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.heads import (
    FLAGS,
    LAYOUTS,
    Recipe,
    assert_drafts_as_computed,
    drafted,
    random_target,
    save_head,
)
from tests.support.models.tiny import CPU
from tests.support.texts import plain_text

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
    "parallel": Recipe(block=3),
    "parallel-deep": Recipe(block=5, layers=2, flags={"norm_before_fc": True, "norm_before_residual": True}),
    "parallel-3.1": Recipe(block=3, embedding=True, flags={"fc_norm": True, "norm_output": True}),
}


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "speculators"])  # see test_speculators
@pytest.mark.parametrize("name", RECIPES)
def test_drafts_equal_reference_in_every_layout(name: str, layout: str, tiny_target: Path, tmp_path: Path) -> None:
    r = RECIPES[name]
    assert_drafts_as_computed(tiny_target, tmp_path, r, save_head(tmp_path, r, layout))


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Draw a head of any size, with any flags."""
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
        block=draw(st.sampled_from([0, 0, 3])),
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
def test_drafts_of_any_head_equal_reference(
    r: Recipe, layout: str, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assume(layout == "speculators" or r.boundaries[0] != 1)  # the other layouts cannot express these boundaries
    folder = tmp_path_factory.mktemp("head")
    assert_drafts_as_computed(tiny_target, folder, r, save_head(folder, r, layout))


def test_head_saved_again_drafts_the_same(tiny_target: Path, tmp_path: Path) -> None:
    for i, r in enumerate(RECIPES.values()):
        made = save_head(tmp_path / f"{i}", r, "speculators")
        EagleHead.load(str(tmp_path / f"{i}")).save(tmp_path / f"{i}-again", torch.float32)
        assert_drafts_as_computed(tiny_target, tmp_path / f"{i}-again", r, made)
    save_head(tmp_path / "no-size", Recipe(block=3))
    with pytest.raises(ValueError, match="names no size of a block"):
        EagleHead.load(str(tmp_path / "no-size")).save(tmp_path / "again")
    save_head(tmp_path / "first", Recipe(boundaries=(1, 4, 5)), "speculators")
    with pytest.raises(ValueError, match="would be read as outputs"):
        EagleHead.load(str(tmp_path / "first")).save(tmp_path / "second")


@pytest.fixture(scope="module")
def wide_target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a target of a size that the kernels compute."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "initializer_range": 0.1}
    return random_target(tmp_path_factory.mktemp("wide") / "target", tiny_target, **sizes)


@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
@pytest.mark.parametrize("name", RECIPES)
def test_int8_drafts_are_close_to_float32(name: str, wide_target: Path, tmp_path: Path) -> None:
    """With every flag, drafts differ only by rounding."""
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


def test_auto_dtype_computes_the_head(wide_target: Path, tmp_path: Path) -> None:
    save_head(tmp_path, Recipe(target_hidden=128, hidden=24, head_dim=6, embedding=True))
    assert drafted(wide_target, tmp_path, "auto").dtype != "int8"


@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("block", [0, 3])
def test_greedy_text_is_plain_text(block: int, width: int, dtype: str, wide_target: Path, tmp_path: Path) -> None:
    """Depths and budgets are random; a block that ends before the asked depth is drafted as far as it goes."""
    target = load_target(str(wide_target), CPU, "float32")
    variant = Variant(mask_token=15, block=block) if block else PLAIN
    EagleHead.from_target(target, load_weights(wide_target), torch.arange(14), variant).save(tmp_path)
    decoder = load_decoder(str(wide_target), str(tmp_path), "cpu", dtype, width=width, max_depth=4)
    rng, native = np.random.default_rng(0), decoder.drafter.model.call is not None  # type: ignore[union-attr]
    assert native == (dtype == "int8")
    accepted = 0
    for _ in range(3):
        prompt = rng.integers(2, 16, 9).tolist()
        text = plain_text(decoder, prompt, 60)
        decoder.start(prompt, 60, rng)
        while not decoder.finished:
            grown = [decoder.expand() for _ in range(rng.integers(0, 5))]
            assert not block or grown == [level < block - 1 for level in range(len(grown))]
            accepted += decoder.verify(int(rng.integers(0, 12))).accepted
        assert decoder.tokens == text
    assert accepted > 0
