"""The kernels in int8: what they compute, and that the bits of a row do not depend on the rest of the batch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from spec_envs.decoding.model import integers, kernels, layers
from spec_envs.decoding.model.batch import generate_batch, read_batch
from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.kernels import building
from spec_envs.decoding.model.lora import Added, Additions
from spec_envs.decoding.model.rows import Rows
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.tree import ROOT
from spec_envs.decoding.weights.checkpoints import load_target
from tests.support import ROOT as REPOSITORY
from tests.support.models.builds import BUILDS, COMPILER, WITHOUT_KERNELS
from tests.support.models.forwards import check_tree_rows, path_to, text_logits, tree_logits
from tests.support.models.pairs import CONFIGS, SHAPE, pair
from tests.support.models.quantised import Quantised, eagle_layer, random_weights
from tests.support.models.tiny import CPU, REAL

if WITHOUT_KERNELS:
    pytest.skip("the kernels cannot be built here (the reason is printed above)", allow_module_level=True)


def test_product_equals_quantised_reference(build: None) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(150, 80), torch.randn(150), torch.randn(37, 80) * torch.rand(37, 1) * 9
    product = integers.Linear(weight, bias)
    expected = Quantised(weight, bias)(x)
    torch.testing.assert_close(product(x), expected, rtol=1e-4, atol=1e-3)
    assert (product.dense() - weight).norm() < 0.01 * weight.norm()
    assert (expected - (x @ weight.T + bias)).norm() < 0.02 * (x @ weight.T).norm()
    assert torch.equal(product.argmax(x), product(x).argmax(-1))
    assert not product(torch.zeros(2, 80)).sub(bias).any()


def test_builds_for_all_processors_give_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator) for size in ((150, 80), (64, 192), (33, 1024))]
    counts = [*range(1, 14), 16, 17, 25, 32, 33, 48, 64, 65, 150]
    rows = [torch.randn(max(counts), weight.shape[1], generator=generator) for weight in weights]
    found = {}
    for name, (flags, _) in BUILDS.items():
        library = building.built(COMPILER, flags)
        monkeypatch.setattr(kernels, "library", lambda library=library: library)
        products = [integers.Linear(weight) for weight in weights]
        found[name] = [product(x[:count]) for product, x in zip(products, rows, strict=True) for count in counts]
    for name, outputs in found.items():
        for ours, theirs in zip(outputs, found["portable"], strict=True):
            assert torch.equal(ours, theirs), (name, list(ours.shape))


def test_norms_and_most_probable_equal_torch(build: None) -> None:
    torch.manual_seed(0)
    x, gain = torch.randn(5, 80), torch.rand(80)
    torch.testing.assert_close(integers.RMSNorm(gain, 1e-5)(x), layers.RMSNorm(gain, 1e-5)(x), rtol=1e-5, atol=1e-6)
    logits, extra = torch.randn(7, 150)[:, :141] * 5, torch.randn(7, 21) * 5
    for other in (extra, None):
        index, *values = integers.most_probable(logits, other, 12)
        expected, *expected_values = layers.most_probable(logits, other, 12)
        assert torch.equal(index, expected)
        torch.testing.assert_close(values, expected_values, rtol=1e-4, atol=1e-5)
        both = logits if other is None else torch.cat([logits, other], -1)
        torch.testing.assert_close(
            values[1], torch.distributions.Categorical(logits=both).entropy(), rtol=1e-4, atol=1e-5
        )


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_model_is_close_to_torch_reference(name: str, build: None) -> None:
    model, reference = pair(CONFIGS[name])
    ids = torch.randint(0, 150, (1, 90), generator=torch.Generator().manual_seed(0))
    ours, theirs = text_logits(model, ids), text_logits(reference, ids)
    error = (ours - theirs).norm() / theirs.norm()
    assert 0 < error < 0.03
    states = reference.forward(reference.embed(ids), reference.cache(90), torch.arange(90)[None], capture=(0, 2))[1]
    cache = model.cache(90)
    _, captured = model.forward(model.embed(ids), cache, torch.arange(90)[None], capture=(2, 0))
    assert torch.equal(captured[0], model.embed(ids))
    assert (captured[1] - states[1]).norm() < 0.02 * states[1].norm()
    shallow, _ = model.forward(model.embed(ids), model.cache(90), torch.arange(90)[None], layers=range(0, 2))
    assert torch.equal(shallow, captured[1])


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_tree_rows_do_not_depend_on_batch(name: str, build: None) -> None:
    check_tree_rows(pair(CONFIGS[name])[0])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_attention_is_merged_from_chunks_of_the_keys_that_a_row_sees(name: str, build: None) -> None:
    """Paths of a tree that pass 128 and 256 keys at other columns than they do alone have the same bits, on any number
    of threads."""
    model, _ = pair(CONFIGS[name])
    rng = np.random.default_rng(0)
    before = torch.get_num_threads()
    try:
        for length in (118, 128, 250):
            prefix = torch.from_numpy(rng.integers(0, 150, (1, length)))
            parents = np.array([max(ROOT, i - int(rng.integers(1, 4))) for i in range(60)])
            tokens = rng.integers(0, 150, 60)
            together = tree_logits(model, prefix, tokens, parents)
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                assert torch.equal(tree_logits(model, prefix, tokens, parents), together)
                for node in (12, 37, 59):
                    path = path_to(parents, node)
                    text = torch.cat([prefix, torch.from_numpy(tokens[path])[None]], 1)
                    assert torch.equal(text_logits(model, text)[0, -1], together[node + 1]), (length, threads, node)
                one_row = tree_logits(model, prefix, tokens[:0], parents[:0])
                assert torch.equal(one_row[0], together[0])
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_rows_do_not_depend_on_left_padding(build: None) -> None:
    model, _ = pair(CONFIGS["llama"])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 150, n).tolist() for n in (3, 17, 9, 140, 5, 12)]
    together = generate_batch(model, prompts, 20, eos={7, 11})
    assert together == [generate_batch(model, [prompt], 20, eos={7, 11})[0] for prompt in prompts]
    features, final = read_batch(model, prompts, capture=(1,))
    for row, prompt in enumerate(prompts):
        f, h = read_batch(model, [prompt], capture=(1,))
        assert torch.equal(features[row, -len(prompt) :], f[0]) and torch.equal(final[row, -len(prompt) :], h[0])


@torch.inference_mode()
@pytest.mark.model
@pytest.mark.parametrize("dtype", ["int8", "q4"])
def test_default_model_rows_do_not_depend_on_batch_size(dtype: str) -> None:
    model = load_target(REAL, CPU, dtype)
    generator = torch.Generator().manual_seed(0)
    prefix, rest = (torch.randint(3, 49152, (1, n), generator=generator) for n in (100, 96))
    cache = model.cache(256)
    model.forward(model.embed(prefix), cache, torch.arange(100)[None])
    cache.length = 100
    alone = []
    for i in range(96):
        x, _ = model.forward(model.embed(rest[:, i : i + 1]), cache, torch.tensor([[100 + i]]))
        cache.length += 1
        alone.append(model.head(x)[0])
    expected = torch.cat(alone)
    for n in range(2, 97):
        cache.length = 100
        x, _ = model.forward(model.embed(rest[:, :n]), cache, torch.arange(100, 100 + n)[None])
        assert torch.equal(model.head(x)[0], expected[:n]), n
        assert torch.equal(model.head.argmax(x)[0], expected[:n].argmax(-1)), n


@torch.inference_mode()
def test_rows_outside_cache_or_context_are_refused(build: None) -> None:
    model, _ = pair(CONFIGS["llama"])
    x = model.embed(torch.zeros(1, 3, dtype=torch.long))
    for positions in ([[0, 1, 512]], [[0, -1, 2]]):
        with pytest.raises(IndexError, match="rows do not fit"):
            model.forward(x, model.cache(8), torch.tensor(positions))
    cache = model.cache(64)
    cache.length = 62
    with pytest.raises(IndexError, match="rows do not fit"):
        model.layers(Rows(x, cache, model.rope, torch.zeros(1, 3, dtype=torch.long)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_dim": 8}, "head size of a multiple of 32, not 8"),
        ({"head_dim": 48}, "head size of a multiple of 32, not 48"),
        ({"hidden_size": 66}, "hidden size of a multiple of 16, not 66"),
        ({"intermediate_size": 100}, "intermediate size of a multiple of 16, not 100"),
        ({"intermediate_size": 133_152}, "intermediate size of at most 133144, not 133152"),
    ],
)
def test_unsupported_sizes_are_refused(changes: dict[str, int], sentence: str) -> None:
    """The same check refuses them when a model is built, and excludes int8 when the dtype is chosen."""
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": 1, "hidden_size": 96, **changes})
    with pytest.raises(ValueError, match=f"dtypes int8 and q4 need a {sentence}; pass another dtype"):
        pair(config)
    assert not integers.computes(config)
    assert integers.computes(LlamaConfig(**SHAPE))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(number: float) -> None:
    weight = torch.randn(64, 64)
    damaged = weight.clone()
    damaged[3, 5] = number
    with pytest.raises(ValueError, match="the weights hold numbers that are not finite"):
        integers.Linear(damaged)
    with pytest.raises(ValueError, match="the weights hold numbers that are not finite"):
        integers.Linear(weight, damaged[3])
    with pytest.raises(ValueError, match="the weights hold numbers that are not finite"):
        integers.RMSNorm(damaged[3], 1e-6)


def test_non_finite_norms_of_heads_are_refused() -> None:
    config = CONFIGS["qwen3"]
    weights = random_weights(config, torch.Generator().manual_seed(0))
    weights["model.layers.0.self_attn.k_norm.weight"][2] = float("nan")
    with pytest.raises(ValueError, match="the weights hold numbers that are not finite"):
        Transformer(config, weights, "int8", CPU)


@torch.inference_mode()
def test_tensors_of_wrong_shape_are_refused() -> None:
    """The kernels get addresses, so a tensor of another size would be read beyond its end."""
    model, _ = pair(CONFIGS["llama"])
    other, _ = pair(CONFIGS["qwen3"])
    x, at = model.embed(torch.zeros(1, 3, dtype=torch.long)), torch.arange(3)[None]

    def assert_refused(match: str, x: Tensor = x, at: Tensor = at, **given: Any) -> None:
        with pytest.raises(IndexError, match=match):
            model.layers(Rows(x, **({"cache": model.cache(8), "rope": model.rope, "positions": at} | given)))

    assert_refused("rows", x[..., :80])
    assert_refused("rows", x.expand(2, 3, 96))
    assert_refused("positions", at=at[:, :2])
    assert_refused("positions", at=at.int())
    assert_refused("cache", cache=other.cache(8))
    assert_refused("cache", cache=KVCache(model.shape, 8, torch.float16, CPU))
    assert_refused("rotary tables", rope=other.rope)
    assert_refused("seen", seen=torch.ones(2, 3, dtype=torch.bool))
    assert_refused("seen", seen=torch.ones(3, 3))
    assert_refused("rows do not fit", seen=torch.ones(3, 9, dtype=torch.bool))
    assert_refused("padding", padding=torch.zeros(2, dtype=torch.long))
    assert_refused("rows do not fit", padding=torch.tensor([-1]))
    assert_refused("rows do not fit", padding=torch.tensor([4]))
    assert_refused("entering", entering=x[..., :80])
    wide = integers.Layers([eagle_layer(model.shape)], dataclasses.replace(model.shape, layers=1))
    with pytest.raises(IndexError, match=r"entering .* does not fit"):  # it reads twice the hidden size
        wide(Rows(x, model.cache(8), model.rope, at))
    with pytest.raises(ValueError, match="a layer after the first one reads another width"):
        integers.Layers([eagle_layer(model.shape)] * 2, model.shape)
    for some in (range(4), range(-1, 2), range(0, 3, 2)):
        assert_refused("layers", layers=some)
    nothing = Additions([None] * 2)
    assert_refused("additions to 2 layers", added=nothing)
    for low_rank in (
        (torch.zeros(4, 80), torch.zeros(4, 320)),
        (torch.zeros(4, 96).half(), torch.zeros(4, 320).half()),
    ):
        assert_refused("additions .* do not fit", added=Additions([Added(low_rank, None), None, None]))
    for product in (model.head, model.norm, model.head.argmax):
        with pytest.raises(IndexError, match="do not fit a width of 96"):
            product(torch.zeros(2, 192))
    for width in (0, 151):
        with pytest.raises(IndexError, match="cannot be chosen"):
            integers.most_probable(torch.zeros(2, 150), None, width)


@torch.inference_mode()
def test_no_rows_and_no_layers(build: None) -> None:
    model, _ = pair(CONFIGS["llama"])
    x, cache = model.embed(torch.arange(5)[None]), model.cache(8)
    hidden, captured = model.forward(x, cache, torch.arange(5)[None], layers=range(3, 3))
    assert torch.equal(hidden, x) and not captured and not cache.data.any()
    nothing = torch.zeros(1, 0, dtype=torch.long)
    hidden, captured = model.forward(model.embed(nothing), cache, nothing, capture=(0, 2))
    assert hidden.shape == captured[1].shape == (1, 0, 96)
    assert model.head(hidden).shape == (1, 0, 150) and model.head.argmax(hidden).shape == (1, 0)


@torch.inference_mode()
def test_prompt_fills_the_context(build: None) -> None:
    """A prompt as long as the context is close to the reference, and its last row alone has the same bits."""
    model, reference = pair(CONFIGS["llama"])
    ids = torch.randint(0, 150, (1, 512), generator=torch.Generator().manual_seed(0))
    ours, theirs = text_logits(model, ids), text_logits(reference, ids)
    assert (ours - theirs).norm() < 0.03 * theirs.norm()
    cache = model.cache(512)
    model.forward(model.embed(ids[:, :511]), cache, torch.arange(511)[None])
    cache.length = 511
    x, _ = model.forward(model.embed(ids[:, 511:]), cache, torch.tensor([[511]]))
    assert torch.equal(model.head(x)[0, 0], ours[0, -1])


@torch.inference_mode()
def test_bits_do_not_depend_on_number_of_threads() -> None:
    model, _ = pair(CONFIGS["qwen3"])
    ids = torch.randint(0, 150, (1, 70), generator=torch.Generator().manual_seed(0))
    expected, before = text_logits(model, ids), torch.get_num_threads()
    try:
        for threads in (2, 5, 1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(text_logits(model, ids), expected)
            assert torch.equal(model.head.argmax(model.embed(ids)), model.head(model.embed(ids)).argmax(-1))
    finally:
        torch.set_num_threads(before)


def test_concurrent_threads_compute_the_same_bits() -> None:
    model, _ = pair(CONFIGS["llama"])

    @torch.inference_mode()
    def logits(seed: int) -> Tensor:
        return text_logits(
            model, torch.randint(0, 150, (1, 20 + 9 * seed), generator=torch.Generator().manual_seed(seed))
        )

    seeds = [*range(6)] * 4
    expected = [logits(seed) for seed in seeds]
    with ThreadPoolExecutor(6) as pool:
        assert all(map(torch.equal, pool.map(logits, seeds), expected))


FORKED = """
import multiprocessing, torch
from spec_envs.decoding.model import integers
torch.set_num_threads(2)
torch.manual_seed(0)
product, dense, x = integers.Linear(torch.randn(64, 64)), torch.nn.Linear(512, 512), torch.randn(8, 64)
many = torch.randn(512, 512)
expected = product(x)
dense(many)  # starts torch's threads
def child(threads):
    if threads:
        torch.set_num_threads(threads)
    else:
        dense(many)
    assert torch.equal(product(x), expected)
for threads in (0, 1, 2):
    process = multiprocessing.get_context("fork").Process(target=child, args=(threads,))
    process.start()
    process.join(60)
    assert process.exitcode == 0, (threads, process.exitcode, process.kill())
assert torch.get_num_threads() == 2 and torch.equal(product(x), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_process_computes() -> None:
    """OpenMP's threads do not survive a fork, so the child would wait for them for ever."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", FORKED], env=environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
