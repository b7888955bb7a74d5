"""A target split at its exit: no row is read twice, and the text is the target's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.exits.adapter import KINDS, ExitAdapter
from spec_envs.decoding.exits.split import SplitVerifier
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.decoding.weights.checkpoints import load_target
from tests.support.models.adapters import PROMPTS, decoded, decoder_of, logits_of, trained
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.tiny import CPU, REAL


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_plain_text_of_the_verifier(kind: str, target: Transformer, tiny_target: Path) -> None:
    adapter = trained(target, str(tiny_target), kind)
    decoder, accepted = decoder_of(adapter), 0
    for prompt in PROMPTS:
        tokens = decoded(decoder, prompt, [3, 0, 6, 1])
        assert tokens == decoded(decoder.plain(), prompt, [0])
        accepted += sum(cycle.accepted for cycle in decoder.cycles)
        base = decoded(Decoder(LocalVerifier(target), None, WallClock(CPU), ()), prompt, [0])
        assert (tokens == base) or kind == "layers"
    assert accepted > 3


def test_no_layer_reads_a_row_twice(target: Transformer, tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(trained(target, str(tiny_target), "head"))
    read: list[tuple[int, int]] = []  # layer and place in the text
    forward = target.forward

    def noted(x: Tensor, cache: Any, positions: Tensor, *rest: Any, layers: range | None = None, **named: Any) -> Any:
        read.extend((layer, int(at)) for layer in layers or range(8) for at in positions[0])
        return forward(x, cache, positions, *rest, layers=layers, **named)

    monkeypatch.setattr(target, "forward", noted)
    decoder.start(PROMPTS[0], 30, np.random.default_rng(0))
    while not decoder.finished:
        read.clear()
        before = decoder.length - 1  # the root's place
        cycle = decoder.cycle(4)
        rows = range(before, before + cycle.verified + 1)
        assert sorted(read) == [(layer, row) for layer in range(8) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drafted_is_what_one_pass_over_the_text_says(kind: str, target: Transformer, tiny_target: Path) -> None:
    """The states that an agent sees in every cycle are those of the differentiable pass over the whole text."""
    adapter = trained(target, str(tiny_target), kind)
    decoder = decoder_of(adapter)
    decoder.start(PROMPTS[0], 30, np.random.default_rng(0))
    seen: dict[int, Tensor] = {}
    step = 0
    while not decoder.finished:
        chain: list[int] = []
        states = [decoder.look()]
        for _ in range((3, 1, 5, 0)[step % 4]):
            decoder.expand() if decoder.drafting else decoder.begin()
            chain.append(int(decoder.tree.tokens[-1]))
            states.append(decoder.look())
        place = decoder.length - 1
        cycle = decoder.verify()
        for i, state in enumerate(states[: len(cycle.tokens)]):  # of rows that are text now
            seen[place + i] = state.clone()
        step += 1
    ids = torch.tensor(decoder.prompt + decoder.tokens)
    shallow = target.layers.read(target.embed(ids)[None], target.rope, range(3), adapter.additions())
    expected = adapter.read(shallow)[0].detach()
    assert len(seen) > 20
    for place, state in seen.items():
        torch.testing.assert_close(state, expected[place], rtol=1e-3, atol=1e-3)


def test_confidence_stops_a_chain(target: Transformer, tiny_target: Path) -> None:
    """Kangaroo drafts nothing after a token to which the exit gave less than the threshold."""
    adapter = trained(target, str(tiny_target), "head")
    free, stopped = decoder_of(adapter), decoder_of(adapter, stop=0.5)
    lengths = set()
    for prompt in PROMPTS:
        assert decoded(free, prompt, [6]) == decoded(stopped, prompt, [6])
        for cycle in stopped.cycles:
            assert (cycle.nodes.probabilities[:-1] >= 0.5).all()
            assert cycle.verified == 6 or cycle.nodes.probabilities[-1] < 0.5
            lengths.add(cycle.verified)
    assert len(lengths) > 2
    with pytest.raises(ValueError, match="stop is 2; expected a probability"):
        decoder_of(adapter, stop=2)


def test_sampling_judges_by_the_target(target: Transformer, tiny_target: Path) -> None:
    """The target's own distribution decides at every row of a drawn chain, whatever drafted it."""
    decoder = decoder_of(trained(target, str(tiny_target), "kangaroo"), temperature=0.8)
    verifier = decoder.local
    assert isinstance(verifier, SplitVerifier)
    decoder.start(PROMPTS[0], 40, np.random.default_rng(3))
    drawn = 0
    while not decoder.finished:
        text = decoder.prompt + decoder.tokens
        cycle = decoder.cycle(3)
        drawn += len(cycle.nodes.tokens)
        expected = logits_of(target, text + cycle.nodes.tokens.tolist())[len(text) - 1 :]
        torch.testing.assert_close(verifier.logits, expected, rtol=1e-3, atol=1e-3)
    assert drawn > 20 and any(cycle.accepted for cycle in decoder.cycles)


def test_drawn_chains_leave_the_targets_distribution_as_it_is(target: Transformer, tiny_target: Path) -> None:
    """The token after the first, over many draws, is distributed as the target's, and the exit's draws there are
    accepted with probability Σ min(p, q)."""
    adapter = trained(target, str(tiny_target), "head")
    adapter.shortlist = None
    decoder = decoder_of(adapter, temperature=0.8)
    counts, expected, accepted, chance, draws = np.zeros(16), np.zeros(16), 0, 0.0, 1500
    known: dict[int, tuple[np.ndarray, float]] = {}  # by first token: the target's distribution, and its overlap
    for seed in range(draws):
        decoder.start(PROMPTS[0], 3, np.random.default_rng(seed))
        first = decoder.tokens[0]
        accepted += decoder.cycle(2).accepted > 0
        if first not in known:
            ids = torch.tensor([[*PROMPTS[0], first]])
            states, _ = target.forward(target.embed(ids), target.cache(9), torch.arange(6)[None], layers=range(3))
            both = logits_of(target, ids[0].tolist())[-1], adapter.logits(states[0, -1:])[0].detach()
            p, q = ((logits / 0.8).softmax(-1).numpy() for logits in both)
            known[first] = p, np.minimum(p, q).sum()
        counts[decoder.tokens[1]] += 1
        expected += known[first][0]
        chance += known[first][1]
    deviation = (expected * (1 - expected / draws)) ** 0.5
    assert (abs(counts - expected) < 4 * deviation + 1).all()
    assert abs(accepted - chance) < 4 * (draws * 0.25) ** 0.5


def test_a_change_keeps_its_place_in_memory(target: Transformer, tiny_target: Path) -> None:
    """Graphs and kernels know what is added by its address."""
    adapter = trained(target, str(tiny_target), "layers")
    decoder = decoder_of(adapter)
    decoded(decoder, PROMPTS[0], [2])
    verifier = decoder.local
    assert verifier.added is not None
    added, kept = verifier.added, [t.data_ptr() for t in verifier.added.tensors()]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter.touched()
    tokens = decoded(decoder, PROMPTS[0], [2])
    assert verifier.added is added and [t.data_ptr() for t in added.tensors()] == kept
    assert tokens == decoded(decoder.plain(), PROMPTS[0], [0]) == decoded(decoder_of(adapter), PROMPTS[0], [2])


def test_a_decoder_takes_up_a_change_when_a_text_begins(target: Transformer, tiny_target: Path) -> None:
    adapter = ExitAdapter.fresh(target, str(tiny_target), 3, "layers", 4)
    decoder = decoder_of(adapter)
    first = decoded(decoder, PROMPTS[1], [2])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    assert decoded(decoder, PROMPTS[1], [2]) == first  # nothing reported the change
    adapter.touched()
    assert decoded(decoder, PROMPTS[1], [2]) != first
    drafter = decoder.drafter
    assert isinstance(drafter, EarlyExitDrafter)
    drafter.use(ExitAdapter.fresh(target, str(tiny_target), 3, "layers", 4))
    assert decoded(decoder, PROMPTS[1], [2]) == first


def test_an_untrained_exit_is_the_target_cut_off(target: Transformer, tiny_target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_target, num_hidden_layers=3, dtype=torch.float32)
    decoder = load_decoder(str(tiny_target), "exit:3", "cpu", "float32", width=1)
    decoder.start(PROMPTS[0], 20, np.random.default_rng(0))
    decoder.cycle(2)
    decoder.begin()
    with torch.no_grad():
        expected = model(torch.tensor([decoder.prompt + decoder.tokens])).logits[0, -1]
    assert int(decoder.tree.tokens[0]) == int(expected.argmax())
    assert float(decoder.tree.scores[0]) == pytest.approx(float(expected.log_softmax(-1).max()), abs=1e-4)


@pytest.mark.model
@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_model_in_int8_keeps_its_text(kind: str) -> None:
    """The text is equal token for token, with some drafts accepted; with adapted layers it is the adapted target's."""
    target = load_target(REAL, CPU, torch.int8)
    adapter = trained(target, REAL, kind, exit_layer=24)  # deep enough that some drafts are right
    if kind != "layers":
        torch.nn.init.zeros_(adapter.exit_proj.lora_B)
    adapter.shortlist = None
    verifier = SplitVerifier(adapter)
    decoder = Decoder(verifier, EarlyExitDrafter(verifier), WallClock(CPU), (), max_depth=5)
    base, accepted = Decoder(LocalVerifier(target), None, WallClock(CPU), ()), 0
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(100, 40_000, 12).tolist()
        tokens = decoded(decoder, prompt, [3, 1, 6], 48)
        assert tokens == decoded(decoder.plain(), prompt, [0], 48)
        assert tokens == decoded(base, prompt, [0], 48) or kind == "layers"
        accepted += sum(cycle.accepted for cycle in decoder.cycles)
    assert accepted > 3
