"""Slots: sequences of different lengths in one forward get the results of each alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

from spec_envs.decoding.model import kernels
from spec_envs.decoding.model.cache import KVCache, SlotBatch, Slots
from spec_envs.decoding.model.graphs import GraphedLayers
from spec_envs.decoding.model.kernels import building
from spec_envs.decoding.model.rows import Rows
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import load_target
from tests.support.models.builds import BUILDS, COMPILER, WITHOUT_KERNELS
from tests.support.models.pairs import CONFIGS, pair
from tests.support.models.tiny import CPU, REAL

MODELS = ["llama", "llama-bias", "qwen2", "qwen3", "portable", "float32"]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tiny_target: Path) -> Transformer:
    """Return a random model in float32, or in int8 with the kernels as built or (portable) without special
    instructions."""
    if request.param == "float32":
        return load_target(str(tiny_target), CPU, "float32")
    if WITHOUT_KERNELS:
        pytest.skip("the kernels cannot be built here")
    if request.param == "portable":
        library = building.built(COMPILER, BUILDS["portable"][0])
        monkeypatch.setattr(kernels, "library", lambda: library)
    return pair(CONFIGS.get(request.param, CONFIGS["llama"]))[0]


def same(model: Transformer, ours: Tensor, alone: Tensor) -> bool:
    """Return True if bits are equal in int8, or numbers are close in float32, where sums depend on neighbouring
    rows."""
    if model.dtype == "int8":
        return torch.equal(ours, alone)
    return bool((ours - alone).abs().max() <= 1e-5 * alone.abs().max())


def ids_of(model: Transformer, *size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, model.config.vocab_size, size, generator=torch.Generator().manual_seed(seed))


def alone(model: Transformer, text: Tensor) -> tuple[Tensor, KVCache]:
    """Return hidden states ``[n, hidden]`` of a text ``[n]`` in one forward, and its cache."""
    cache = model.cache(len(text))
    x, _ = model.forward(model.embed(text[None]), cache, torch.arange(len(text))[None])
    return x[0], cache


def together(model: Transformer, batch: SlotBatch, rows: list[Tensor]) -> Tensor:
    """Return hidden states ``[batch, n, hidden]`` of rows ``[<= n]`` after the slots, padded on the right with a
    fixed token."""
    n = max(map(len, rows))
    padding_ids = torch.full((n,), model.config.vocab_size - 1)
    ids = torch.stack([torch.cat([row, padding_ids[len(row) :]]) for row in rows])
    positions = torch.from_numpy(batch.lengths[:, None] + np.arange(n))
    return model.forward(model.embed(ids), batch, positions)[0]


def filled(model: Transformer, texts: list[Tensor], capacity: int = 200) -> Slots:
    """Return slots with one text each, read slot by slot."""
    slots = model.slots(len(texts), capacity)
    for slot, text in enumerate(texts):
        if len(text):
            together(model, slots.batch([slot]), [text])
            slots.lengths[slot] = len(text)
    return slots


@torch.inference_mode()
def test_batched_slots_equal_single_sequences(model: Transformer) -> None:
    lengths, new = [0, 150, 1, 63, 64, 65, 7, 100], 5
    texts = [ids_of(model, length + new, seed=i) for i, length in enumerate(lengths)]
    slots = filled(model, [text[:length] for text, length in zip(texts, lengths, strict=True)])
    for chosen in ([3, 0, 7], [5], [6, 4, 3, 2, 1, 0, 5, 7]):
        x = together(model, slots.batch(chosen), [texts[slot][lengths[slot] :] for slot in chosen])
        for hidden, slot in zip(x, chosen, strict=True):
            expected, cache = alone(model, texts[slot])
            end = len(texts[slot])
            assert same(model, hidden, expected[-new:]), (chosen, slot)
            assert same(model, slots.data[:, :, slot, :, :end], cache.data[:, :, 0, :, :end]), (chosen, slot)
            assert torch.equal(model.head.argmax(hidden), model.head.argmax(expected[-new:]))
        assert slots.lengths.tolist() == lengths


@torch.inference_mode()
def test_rows_equal_decoding_token_by_token(model: Transformer) -> None:
    text = ids_of(model, 40)
    cache, rows = model.cache(40), []
    for i in range(40):
        rows.append(model.forward(model.embed(text[None, i : i + 1]), cache, torch.tensor([[i]]))[0][0])
        cache.length += 1
    slots = filled(model, [ids_of(model, 90, seed=1), text[:33]])
    x = together(model, slots.batch([1, 0]), [text[33:], ids_of(model, 3)])
    assert same(model, x[0], torch.cat(rows[33:]))


@torch.inference_mode()
def test_ranges_of_layers_and_captured_states(model: Transformer) -> None:
    slots = filled(model, [ids_of(model, 9), ids_of(model, 70)])
    x, batch = model.embed(ids_of(model, 2, 3)), slots.batch([1, 0])
    positions = torch.from_numpy(batch.lengths[:, None] + np.arange(3))
    whole, captured = model.forward(x, batch, positions, capture=(0, 2))
    assert torch.equal(captured[0], x)
    lower, _ = model.forward(x, batch, positions, layers=range(0, 2))
    assert torch.equal(lower, captured[1])
    upper, _ = model.forward(lower, batch, positions, layers=range(2, model.shape.layers))
    assert torch.equal(upper, whole)


@torch.inference_mode()
def test_setting_a_length_rolls_back(model: Transformer) -> None:
    text, other = ids_of(model, 50), ids_of(model, 50, seed=1)
    slots = filled(model, [text, ids_of(model, 80, seed=2)])
    slots.lengths[0] = 20
    x = together(model, slots.batch([0, 1]), [other[20:26], ids_of(model, 4)])
    assert same(model, x[0], alone(model, torch.cat([text[:20], other[20:26]]))[0][20:])
    slots.lengths[0] = 0
    assert same(model, together(model, slots.batch([1, 0]), [text[:1], other])[1], alone(model, other)[0])


@torch.inference_mode()
def test_right_padding_does_not_affect_other_slots(model: Transformer) -> None:
    texts = [ids_of(model, 30), ids_of(model, 45, seed=1), ids_of(model, 12, seed=2)]
    slots = filled(model, [texts[0][:20], texts[1][:40], texts[2][:11]])
    idle = slots.data[:, :, 1].clone()
    x = together(model, slots.batch([2, 0]), [texts[2][11:], texts[0][20:29]])
    assert torch.equal(slots.data[:, :, 1], idle)
    slots.lengths[[2, 0]] += [1, 9]
    assert same(model, x[0, :1], alone(model, texts[2])[0][11:])
    x = together(model, slots.batch([0, 1, 2]), [texts[0][29:], texts[1][40:], ids_of(model, 7, seed=3)])
    assert same(model, x[0, :1], alone(model, texts[0])[0][29:])
    assert same(model, x[1, :5], alone(model, texts[1])[0][40:])
    expected = alone(model, torch.cat([texts[2], ids_of(model, 7, seed=3)]))[0]
    assert same(model, x[2], expected[12:])


@torch.inference_mode()
def test_slots_advancing_at_different_rates_equal_single_sequences(model: Transformer) -> None:
    rng = np.random.default_rng(0)
    texts = [ids_of(model, 90, seed=i) for i in range(5)]
    slots = model.slots(5, 120)
    states: list[list[Tensor]] = [[] for _ in texts]
    while True:
        unfinished = [slot for slot in range(5) if slots.lengths[slot] < 90]
        if not unfinished:
            break
        chosen = rng.permutation(unfinished)[: rng.integers(1, 6)].tolist()
        rows = [texts[slot][slots.lengths[slot] :][: rng.integers(1, 20)] for slot in chosen]
        x = together(model, slots.batch(chosen), rows)
        for slot, row, hidden in zip(chosen, rows, x, strict=True):
            kept = int(rng.integers(0, len(row) + 1))  # the rest is rejected and sent again
            states[slot].append(hidden[:kept])
            slots.lengths[slot] += kept
    for slot, text in enumerate(texts):
        expected, cache = alone(model, text)
        assert same(model, torch.cat(states[slot]), expected)
        assert same(model, slots.data[:, :, slot, :, :90], cache.data[:, :, 0, :, :90])


@torch.inference_mode()
def test_invalid_batches_are_refused(model: Transformer) -> None:
    slots = model.slots(4, 64)
    slots.lengths[:] = 3, 60, 0, 64
    for wrong in ([], [1, 1], [4], [-1]):
        with pytest.raises(ValueError, match="one or more different slots below 4, not"):
            slots.batch(wrong)
    x, positions = model.embed(torch.zeros(2, 5, dtype=torch.long)), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="5 rows after the 60 of slot 1 do not fit its 64"):
        model.forward(x, slots.batch([0, 1]), positions)
    with pytest.raises(ValueError, match="rows of 2 sequences were given for 3 slots"):
        model.forward(x, slots.batch([0, 2, 1]), positions)
    seen, padding = torch.ones(5, 5, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    for masks in ((seen, None), (None, padding)):
        with pytest.raises(ValueError, match="leave out seen and padding"):
            model.forward(x, slots.batch([0, 2]), positions, *masks)
    model.forward(x[:, :4], slots.batch([0, 1]), positions[:, :4])
    if model.dtype == "int8":
        with pytest.raises(IndexError, match="rows do not fit"):
            model.layers(Rows(x, slots.batch([0, 3]), model.rope, positions))


@torch.inference_mode()
def test_slot_batches_are_not_captured_as_graphs(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_target(str(tiny_target), CPU, "float32")
    slots = filled(model, [ids_of(model, 9)])
    expected = together(model, slots.batch([0]), [ids_of(model, 3)])

    def record(run: Any) -> NoReturn:
        raise AssertionError("a batch of slots was captured")

    monkeypatch.setattr(model, "layers", GraphedLayers(model.layers, record))
    assert torch.equal(together(model, slots.batch([0]), [ids_of(model, 3)]), expected)


@torch.inference_mode()
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read in /proc")
def test_memory_is_allocated_as_rows_are_written(tiny_target: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    model = load_target(str(tiny_target), CPU, "float32")
    before = resident()
    slots = model.slots(2000, 2000)
    together(model, slots.batch([1234]), [ids_of(model, 20)])
    assert not slots.data[0, 0, 0].any()
    assert slots.data.nbytes > 2**30 and resident() - before < 2**28


@torch.inference_mode()
@pytest.mark.model
@pytest.mark.skipif(WITHOUT_KERNELS, reason="the kernels cannot be built here")
def test_default_model_rows_do_not_depend_on_slots() -> None:
    model = load_target(REAL, CPU, "int8")
    lengths = [120, 33, 64, 1]
    texts = [ids_of(model, length + 5, seed=i) for i, length in enumerate(lengths)]
    slots = filled(model, [text[:-5] for text in texts])
    x = together(model, slots.batch(range(4)), [text[-5:] for text in texts])
    for slot, text in enumerate(texts):
        expected, cache = alone(model, text)
        assert torch.equal(x[slot], expected[-5:])
        assert torch.equal(slots.data[:, :, slot, :, : len(text)], cache.data[:, :, 0, :, : len(text)])
