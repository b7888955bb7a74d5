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
from tests.support.models.adapters import PROMPTS, decode_text, decoder_of, logits_of, random_adapter
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.tiny import CPU, REAL


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_plain_text(kind: str, target: Transformer, tiny_target: Path) -> None:
    adapter = random_adapter(target, str(tiny_target), kind)
    decoder, accepted = decoder_of(adapter), 0
    for prompt in PROMPTS:
        tokens = decode_text(decoder, prompt, [3, 0, 6, 1])
        assert tokens == decode_text(decoder.plain(), prompt, [0])
        accepted += sum(cycle.accepted for cycle in decoder.cycles)
        base = decode_text(Decoder(LocalVerifier(target), None, WallClock(CPU), ()), prompt, [0])
        assert (tokens == base) or kind == "layers"
    assert accepted > 3


def test_no_layer_reads_a_row_twice_in_a_cycle(
    target: Transformer, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(random_adapter(target, str(tiny_target), "head"))
    read: list[tuple[int, int]] = []  # layer, and place in the text
    forward = target.forward

    def recorded(
        x: Tensor, cache: Any, positions: Tensor, *rest: Any, layers: range | None = None, **named: Any
    ) -> Any:
        read.extend((layer, int(at)) for layer in layers or range(8) for at in positions[0])
        return forward(x, cache, positions, *rest, layers=layers, **named)

    monkeypatch.setattr(target, "forward", recorded)
    decoder.start(PROMPTS[0], 30, np.random.default_rng(0))
    while not decoder.finished:
        read.clear()
        before = decoder.length - 1  # the place of the root
        cycle = decoder.cycle(4)
        rows = range(before, before + cycle.verified + 1)
        assert sorted(read) == [(layer, row) for layer in range(8) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_states_equal_single_pass(kind: str, target: Transformer, tiny_target: Path) -> None:
    """The states that an agent observes in every cycle are those of the differentiable pass over the whole text."""
    adapter = random_adapter(target, str(tiny_target), kind)
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
        for i, state in enumerate(states[: len(cycle.tokens)]):  # rows that are part of the text now
            seen[place + i] = state.clone()
        step += 1
    ids = torch.tensor(decoder.prompt + decoder.tokens)
    shallow = target.layers.read(target.embed(ids)[None], target.rope, range(3), adapter.additions())
    expected = adapter.read(shallow)[0].detach()
    assert len(seen) > 20
    for place, state in seen.items():
        torch.testing.assert_close(state, expected[place], rtol=1e-3, atol=1e-3)


def test_low_confidence_stops_the_chain(target: Transformer, tiny_target: Path) -> None:
    """Nothing is drafted after a token to which the exit gave less than the threshold, as in Kangaroo."""
    adapter = random_adapter(target, str(tiny_target), "head")
    free, stopped = decoder_of(adapter), decoder_of(adapter, stop=0.5)
    lengths = set()
    for prompt in PROMPTS:
        assert decode_text(free, prompt, [6]) == decode_text(stopped, prompt, [6])
        for cycle in stopped.cycles:
            assert (cycle.nodes.probabilities[:-1] >= 0.5).all()
            assert cycle.verified == 6 or cycle.nodes.probabilities[-1] < 0.5
            lengths.add(cycle.verified)
    assert len(lengths) > 2
    with pytest.raises(ValueError, match="stop is 2; expected a probability"):
        decoder_of(adapter, stop=2)


def test_sampling_verifies_with_target_distribution(target: Transformer, tiny_target: Path) -> None:
    """At every row of a sampled chain the target's own distribution decides, whatever drafted it."""
    decoder = decoder_of(random_adapter(target, str(tiny_target), "kangaroo"), temperature=0.8)
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


def test_sampled_chains_keep_targets_distribution(target: Transformer, tiny_target: Path) -> None:
    """Over many draws the second token is distributed as the target's, and the exit's draws for it are accepted
    with probability Σ min(p, q)."""
    adapter = random_adapter(target, str(tiny_target), "head")
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


def test_changed_adapter_keeps_its_memory_addresses(target: Transformer, tiny_target: Path) -> None:
    """Graphs and kernels refer to the additions by address."""
    adapter = random_adapter(target, str(tiny_target), "layers")
    decoder = decoder_of(adapter)
    decode_text(decoder, PROMPTS[0], [2])
    verifier = decoder.local
    assert verifier.text.added is not None
    added, kept = verifier.text.added, [t.data_ptr() for t in verifier.text.added.tensors()]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter.touched()
    tokens = decode_text(decoder, PROMPTS[0], [2])
    assert verifier.text.added is added and [t.data_ptr() for t in added.tensors()] == kept
    assert tokens == decode_text(decoder.plain(), PROMPTS[0], [0]) == decode_text(decoder_of(adapter), PROMPTS[0], [2])


def test_reported_change_takes_effect_at_next_text(target: Transformer, tiny_target: Path) -> None:
    adapter = ExitAdapter.fresh(target, str(tiny_target), 3, "layers", 4)
    decoder = decoder_of(adapter)
    first = decode_text(decoder, PROMPTS[1], [2])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    assert decode_text(decoder, PROMPTS[1], [2]) == first  # the change was not reported
    adapter.touched()
    assert decode_text(decoder, PROMPTS[1], [2]) != first
    drafter = decoder.drafter
    assert isinstance(drafter, EarlyExitDrafter)
    drafter.use(ExitAdapter.fresh(target, str(tiny_target), 3, "layers", 4))
    assert decode_text(decoder, PROMPTS[1], [2]) == first


def test_untrained_exit_is_the_truncated_target(target: Transformer, tiny_target: Path) -> None:
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
def test_greedy_text_of_real_model_in_int8(kind: str) -> None:
    """The text equals plain decoding token for token, with some drafts accepted; adapted layers give the text of
    the adapted target."""
    target = load_target(REAL, CPU, "int8")
    adapter = random_adapter(target, REAL, kind, exit_layer=24)  # deep enough that some drafts are accepted
    if kind != "layers":
        torch.nn.init.zeros_(adapter.exit_proj.lora_B)
    adapter.shortlist = None
    verifier = SplitVerifier(adapter)
    decoder = Decoder(verifier, EarlyExitDrafter(verifier), WallClock(CPU), (), max_depth=5)
    base, accepted = Decoder(LocalVerifier(target), None, WallClock(CPU), ()), 0
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(100, 40_000, 12).tolist()
        tokens = decode_text(decoder, prompt, [3, 1, 6], 48)
        assert tokens == decode_text(decoder.plain(), prompt, [0], 48)
        assert tokens == decode_text(base, prompt, [0], 48) or kind == "layers"
        accepted += sum(cycle.accepted for cycle in decoder.cycles)
    assert accepted > 3
