"""Products of stored blocks are those of the dequantised weights, in every build, and rows are independent."""

from __future__ import annotations

import itertools

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, LlamaConfig

from spec_envs.decoding.model import integers, products
from spec_envs.decoding.model.kernels.block_packing import FORMATS
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.blocks import Blocks
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.forwards import check_tree_rows, text_logits
from tests.support.models.gguf_files import quantised
from tests.support.models.pairs import SHAPE
from tests.support.models.random_blocks import HALVES, random_blocks
from tests.support.models.tiny import CPU

if WITHOUT_KERNELS:
    pytest.skip("the kernels cannot be built here (the reason is printed above)", allow_module_level=True)

Kind = GGMLQuantizationType


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 512), (16, 256), (33, 768)])
def test_product_is_that_of_the_dequantised_weight(kind: Kind, outputs: int, inputs: int, build: None) -> None:
    torch.manual_seed(0)
    weight, bias = random_blocks(kind, outputs, inputs), torch.randn(outputs)
    x = torch.randn(17, inputs) * torch.rand(17, 1) * 100
    product = integers.Linear(weight, bias)
    found, exact = product(x), x.double() @ weight.dense().double().T + bias
    assert (found - exact).norm() < 3e-5 * exact.norm()
    assert torch.equal(product.argmax(x), found.argmax(-1))
    torch.testing.assert_close(product.dense(), weight.dense(), rtol=1e-6, atol=1e-7)
    assert torch.equal(product(torch.zeros(2, inputs)), bias.expand(2, -1))


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_row_has_the_same_bits_among_other_rows(kind: Kind, build: None) -> None:
    x = torch.randn(97, 512, generator=torch.Generator().manual_seed(1))
    product = integers.Linear(random_blocks(kind, 48, 512))
    together = product(x)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 31):
        for first in (0, 1, 40, 97 - count):
            assert torch.equal(product(x[first : first + count]), together[first : first + count])


def test_kinds_may_stand_below_each_other(build: None) -> None:
    parts = [random_blocks(kind, n, 256, n) for kind, n in ((Kind.Q4_K, 48), (Kind.Q6_K, 32), (Kind.Q4_K, 16))]
    bias, x = torch.arange(96.0), torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    product = integers.Linear(parts, bias)
    dense = torch.cat([part.dense() for part in parts])
    torch.testing.assert_close(product.dense(), dense)
    found, exact = product(x), x @ dense.T + bias
    assert (found - exact).norm() < 3e-5 * exact.norm()
    assert torch.equal(product.argmax(x), found.argmax(-1))
    for part, outputs in zip(parts, found.split([48, 32, 16], -1), strict=True):
        alone = integers.Linear(part)(x)
        first = int(torch.tensor([48, 32, 16])[: parts.index(part)].sum())
        torch.testing.assert_close(alone + bias[first : first + len(part.data)], outputs, rtol=0, atol=1e-4)


def test_small_and_large_rows_keep_their_precision() -> None:
    weight = random_blocks(Kind.Q4_1, 32, 512)
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(3))
    x[0, 3] = 3000.0  # an outlier does not coarsen the inputs of other blocks
    product, exact = integers.Linear(weight), x.double() @ weight.dense().double().T
    assert (product(x) - exact).norm() < 1e-4 * exact.norm()
    rest = x.clone()
    rest[0, :32] = 0
    part = rest.double() @ weight.dense().double().T
    assert (product(rest) - part).norm() < 2e-5 * part.norm()
    for size in (1e-20, 1e20):
        torch.testing.assert_close(product(rest * size) / size, product(rest), rtol=1e-3, atol=1e-1)
    assert not product(rest * 1e-37).any()  # counts as zero


@pytest.fixture
def models() -> tuple[Transformer, Transformer]:
    """The same random model of several kinds of blocks, multiplied as they are and in float32."""
    config = LlamaConfig(
        **{**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}, tie_word_embeddings=False
    )
    config.attention_bias = True
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor | Blocks] = dict(AutoModelForCausalLM.from_config(config).state_dict())
    kinds = itertools.cycle((Kind.Q4_0, Kind.Q4_1, Kind.Q8_0))
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            kind = Kind.Q4_1 if "gate" in name or "up" in name else next(kinds)
            weights[name] = quantised(weight.numpy(), kind)
    return Transformer(config, weights, "q4", CPU), Transformer(config, weights, "float32", CPU)


@torch.inference_mode()
def test_model_is_that_of_the_dequantised_weights(models: tuple[Transformer, Transformer], build: None) -> None:
    ids = torch.randint(0, 150, (1, 90), generator=torch.Generator().manual_seed(0))
    ours, theirs = (text_logits(model, ids) for model in models)
    assert 0 < (ours - theirs).norm() < 3e-4 * theirs.norm()
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@torch.inference_mode()
def test_tree_rows_do_not_depend_on_batch(models: tuple[Transformer, Transformer], build: None) -> None:
    check_tree_rows(models[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_damaged_scales_are_refused(kind: Kind, scale: str) -> None:
    weight = random_blocks(kind, 32, 512)
    for at in HALVES[kind]:
        damaged = Blocks(kind, weight.data.clone())
        damaged.data[5, at : at + 2] = torch.tensor([float(scale)], dtype=torch.float16).view(torch.uint8)
        with pytest.raises(ValueError, match="not finite or too large for q4"):
            integers.Linear(damaged)
        assert not damaged.dense().isfinite().all()


@pytest.mark.filterwarnings("error")
def test_large_scales_are_exact_or_refused() -> None:
    """The kernels' least number of Q4_0 is the scale times -8 in float16."""
    for kind, size, fits in ((Kind.Q4_0, 8000.0, True), (Kind.Q4_0, 65000.0, False), (Kind.Q8_0, 65000.0, True)):
        weight = random_blocks(kind, 32, 64, size=size)
        if fits:
            torch.testing.assert_close(integers.Linear(weight).dense(), weight.dense())
        else:
            with pytest.raises(ValueError, match="too large for q4"):
                integers.Linear(weight)


def test_rows_that_do_not_exist_are_refused() -> None:
    product = integers.Linear(random_blocks(Kind.Q8_0, 40, 64))
    for wrong in (-1, 40):
        with pytest.raises(IndexError):
            product.rows(torch.tensor([0, wrong]))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="below the other"):
        integers.Linear([random_blocks(Kind.Q8_0, 40, 64), random_blocks(Kind.Q4_1, 32, 64)])
    with pytest.raises(ValueError, match="gate and up"):
        products.reordered([random_blocks(Kind.Q8_0, 32, 64), random_blocks(Kind.Q4_1, 32, 64)], torch.arange(64))
    mixed: dict[str, torch.Tensor | Blocks] = {
        "a.weight": random_blocks(Kind.Q8_0, 32, 64),
        "b.weight": torch.ones(32, 64),
    }
    with pytest.raises(ValueError, match="some are stored in blocks"):
        products.stacked(mixed, ["a", "b"])
