"""Texts in one call into the kernels have the bits of those that are read step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spec_envs.decoding.model.integer_text import PIECE, IntegerText
from spec_envs.decoding.model.lora import Added, Additions
from spec_envs.decoding.target_text import TorchText, open_text
from spec_envs.decoding.tree import ROOT
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.pairs import CONFIGS, pair

NOTHING = np.zeros(0, np.int64)
needs_kernels = pytest.mark.skipif(WITHOUT_KERNELS, reason="the kernels cannot be built here")


def random_tree(rng: np.random.Generator, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and parents of a random tree."""
    return rng.integers(0, 150, nodes), np.array([rng.integers(ROOT, i) if i else ROOT for i in range(nodes)])


def path(rng: np.random.Generator, parents: np.ndarray) -> list[int]:
    """Return the rows of the root and of the nodes up to a random one."""
    rows, node = [], int(rng.integers(ROOT, len(parents)))
    while node != ROOT:
        rows.insert(0, node + 1)
        node = int(parents[node])
    return [0, *rows]


@needs_kernels
@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("capture", [(), (0, 1, 3)])
def test_every_row_choice_and_feature_is_the_same(name: str, capture: tuple[int, ...]) -> None:
    """Prompts in pieces, plain steps, trees larger than a piece, and paths that are kept."""
    model, _ = pair(CONFIGS[name])
    rng = np.random.default_rng(0)
    ours, theirs = texts = IntegerText(model, capture), TorchText(model, capture)
    for text in texts:
        text.begin(500)
    prompt = rng.integers(0, 150, PIECE - 20 if name == "llama" else 40).tolist()
    assert torch.equal(*(text.append(prompt, True) for text in texts))
    for nodes in (0, 12, 0, 1, 33, 95, PIECE + 9, 0):
        assert torch.equal(ours.hidden()[-1], theirs.hidden()[-1])
        assert np.array_equal(*(text.choices() for text in texts))
        tokens, parents = random_tree(rng, nodes)
        for text in texts:
            text.read(7, tokens, parents, True)
        assert torch.equal(ours.hidden(), theirs.hidden())
        rows = path(rng, parents)
        assert torch.equal(*(text.keep(rows) for text in texts))
        assert ours.cache.length == theirs.cache.length
    end = ours.cache.length
    assert torch.equal(ours.cache.data[..., :end, :], theirs.cache.data[..., :end, :])


@needs_kernels
@torch.inference_mode()
def test_adapters_join_the_layers() -> None:
    model, _ = pair(CONFIGS["llama"])
    torch.manual_seed(0)
    layer = model.layers.structures[1]
    low_rank = torch.randn(4, layer.out.inputs) * 0.1, torch.randn(4, layer.out.outputs) * 0.1
    plain, *texts = IntegerText(model, ()), IntegerText(model, ()), TorchText(model, ())
    for text in texts:
        text.added = Additions([None, Added(None, low_rank), None])
    for text in (plain, *texts):
        text.begin(20)
        text.append([5, 6, 7, 8], True)
    ours, theirs = texts
    assert torch.equal(ours.hidden(), theirs.hidden()) and not torch.equal(plain.hidden(), ours.hidden())


@needs_kernels
def test_wrong_rows_are_refused_and_change_nothing() -> None:
    model, _ = pair(CONFIGS["llama"])
    text = IntegerText(model, ())
    text.begin(20)
    text.append([1, 2, 3], True)
    for last, tokens, parents in ((150, [], []), (1, [-1], [ROOT]), (1, [2, 3], [1, ROOT]), (1, [2], [-2])):
        with pytest.raises(IndexError, match="do not fit the cache, the context or the vocabulary"):
            text.read(last, np.array(tokens, np.int64), np.array(parents, np.int64), True)
    choice, length = text.choices().tolist(), text.cache.length
    text.read(1, np.full(5, 2), np.full(5, ROOT), True)
    for rows in ([1, 0], [0, 0], [-1]):
        with pytest.raises(IndexError, match="do not fit"):
            text.keep([*rows, 5])
    for rows in ([0, 6], [6], [PIECE]):
        with pytest.raises(IndexError, match=f"row {rows[-1]} cannot be kept; 6 were read"):
            text.keep(rows)
    assert text.cache.length == length
    text.begin(20)
    text.append([1, 2, 3], True)
    assert text.choices().tolist() == choice
    text.cache.length = text.cache.capacity - 1
    with pytest.raises(ValueError, match="2049 rows do not fit a cache of 2048"):
        text.read(1, np.array([2]), np.array([ROOT]), True)
    with pytest.raises(IndexError, match="do not fit the cache, the context"):
        text.read(1, NOTHING, NOTHING, True)  # its position is beyond the context


@needs_kernels
@torch.inference_mode()
@pytest.mark.parametrize("capture", [(), (1,)])
def test_one_row_beside_the_root_is_kept(capture: tuple[int, ...]) -> None:
    model, _ = pair(CONFIGS["llama"])
    texts = IntegerText(model, capture), TorchText(model, capture)
    for text in texts:
        text.begin(20)
        text.append([1, 2, 3], True)
        text.read(4, np.array([5, 6, 7]), np.full(3, ROOT), True)
        text.keep([2])
    ours, theirs = (text.cache.data[..., : text.cache.length, :] for text in texts)
    assert torch.equal(ours, theirs)


def test_the_kernels_read_for_int8_only() -> None:
    model, reference = pair(CONFIGS["llama"])
    assert isinstance(open_text(model), IntegerText) and isinstance(open_text(reference), TorchText)
