"""Early exits: nothing is read twice, the text is the target's own, and adapters stay beside the weights."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.exits.adapter import KINDS, ExitAdapter, inject_lora
from spec_envs.decoding.exits.files import load_exit, save_exit
from spec_envs.decoding.exits.split import SplitVerifier
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.model.lora import LayersLoRA, additions
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.decoding.weights.checkpoints import load_target
from tests.conftest import CPU, REAL, WITHOUT_KERNELS

PROMPTS = ([2, 3, 4, 5, 6], [9, 8, 7], [12, 2, 12, 2, 12])


@pytest.fixture
def target(tiny_target: Path) -> Transformer:
    return load_target(str(tiny_target), CPU, torch.float32)


def trained(target: Transformer, name: str, kind: str, exit_layer: int = 3, seed: int = 0) -> ExitAdapter:
    """An adapter with weights as if it had learned something."""
    torch.manual_seed(seed)
    adapter = ExitAdapter.fresh(target, name, exit_layer, kind, rank=4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if kind == "layers" else 0.1))
    adapter.shortlist = np.arange(0, target.shape.vocab, 2)
    return adapter


def decoder_of(adapter: ExitAdapter, k: int = 6, temperature: float = 0.0, stop: float = 0.0) -> Decoder:
    verifier = SplitVerifier(adapter, temperature)
    return Decoder(verifier, EarlyExitDrafter(verifier, stop), WallClock(CPU), (), max_depth=k - 1)


def decoded(decoder: Decoder, prompt: list[int], lengths: list[int], tokens: int = 40) -> list[int]:
    decoder.start(prompt, tokens, np.random.default_rng(0))
    for i in range(tokens):
        if decoder.finished:
            break
        decoder.cycle(lengths[i % len(lengths)])
    return decoder.tokens


def logits_of(model: Transformer, ids: list[int], **keywords: Any) -> Tensor:
    x = model.embed(torch.tensor([ids]))
    positions = torch.arange(len(ids))[None]
    return model.head(model.forward(x, model.cache(len(ids)), positions, **keywords)[0])[0]


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
    """The states that an agent sees, cycle after cycle, are those of the differentiable pass over the whole text."""
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
    """Kangaroo: nothing behind a token that the exit gave less than the threshold."""
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
    """What decides at every row of a drawn chain is the target's own distribution, whatever drafted."""
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
    """What follows the first token, over many draws, is distributed as the target's, and what the exit drew there was
    taken as often as Σ min(p, q) says."""
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


def test_an_exit_is_of_one_target_whatever_it_is_called(tiny_target: Path, tmp_path: Path) -> None:
    """The fingerprint sees every tensor, and no dtype; the file's name of a target leads nowhere."""
    targets = [load_target(str(tiny_target), CPU, dtype) for dtype in (torch.float32, torch.float16)]
    assert targets[0].fingerprint == targets[1].fingerprint
    save_exit(ExitAdapter.fresh(targets[0], str(tiny_target), 3, "kangaroo"), tmp_path / "exit")
    shutil.copytree(tiny_target, tmp_path / "again")
    weights = load_file(tmp_path / "again" / "model.safetensors")
    same = load_target(str(tmp_path / "again"), CPU, torch.float32)
    stored = json.loads((tmp_path / "exit" / "exit.json").read_text()) | {"base_model": "nobody/nothing"}
    (tmp_path / "exit" / "exit.json").write_text(json.dumps(stored))
    assert load_exit(tmp_path / "exit", same, str(tmp_path / "again")).settings.base_model == str(tmp_path / "again")
    shutil.copytree(tiny_target, tmp_path / "tuned")
    weights["model.layers.5.self_attn.q_proj.weight"] += 0.01
    save_file(weights, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="whose weights are others"):
        load_exit(tmp_path / "exit", load_target(str(tmp_path / "tuned"), CPU, torch.float32), "tuned")


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_targets_weights_are_never_written_to(kind: str, target: Transformer, tiny_target: Path) -> None:
    before = logits_of(target, list(range(2, 14)))
    adapter = trained(target, str(tiny_target), kind)
    other = ExitAdapter.fresh(target, str(tiny_target), 3, kind)
    decoder = decoder_of(adapter)
    decoded(decoder, PROMPTS[0], [3])
    assert torch.equal(logits_of(target, list(range(2, 14))), before)
    mine, theirs = (dict(a.named_parameters()) for a in (adapter, other))
    assert all(mine[name].data_ptr() != theirs[name].data_ptr() for name in mine)

    snapshot = adapter.snapshot()
    kept = {name: p.clone() for name, p in snapshot.named_parameters()}
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1.0)
    assert snapshot.target is target and not any(p.requires_grad for p in snapshot.parameters())
    assert all(torch.equal(p, kept[name]) for name, p in snapshot.named_parameters())


def test_a_decoder_takes_up_a_change_when_a_text_begins(target: Transformer, tiny_target: Path) -> None:
    adapter = ExitAdapter.fresh(target, str(tiny_target), 3, "layers", 4)
    decoder = decoder_of(adapter)
    first = decoded(decoder, PROMPTS[1], [2])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    assert decoded(decoder, PROMPTS[1], [2]) == first  # nothing said that it changed
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


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_peft(kind: str, target: Transformer, tiny_target: Path, tmp_path: Path) -> None:
    """Loaded by peft onto transformers' own model, the adapters say the same."""
    adapter = trained(target, str(tiny_target), kind)
    save_exit(adapter, tmp_path)
    again = load_exit(tmp_path, target, str(tiny_target))
    assert again.settings == adapter.settings and np.array_equal(again.shortlist, adapter.shortlist)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adapter.parameters(), strict=True))
    ids = list(range(2, 15))
    if kind == "layers":
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32), tmp_path / "lora_S", "lora_S"
        )
        model.load_adapter(tmp_path / "lora_D", "lora_D")
        model.base_model.set_adapter(["lora_S", "lora_D"])
        ours = logits_of(target, ids, added=adapter.deployed_additions())
    else:
        cut_off = AutoModelForCausalLM.from_pretrained(tiny_target, num_hidden_layers=3, dtype=torch.float32)
        model = PeftModel.from_pretrained(cut_off, tmp_path / "exit_proj")
        if kind == "kangaroo":
            return  # its attention is no part of peft's formats
        x = target.embed(torch.tensor([ids]))
        states, _ = target.forward(x, target.cache(20), torch.arange(len(ids))[None], layers=range(3))
        ours = adapter.logits(states[0])
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (theirs - logits_of(target, ids)).abs().max() > 0.01


def test_inject_lora_has_a_configuration_on_each_side(target: Transformer) -> None:
    parts = inject_lora(target, 3, rank=2, alpha=4, products=("k_proj", "o_proj"))
    assert [part.range for part in parts.values()] == [range(3), range(3, 8)] and list(parts) == ["lora_S", "lora_D"]
    ids = list(range(2, 12))
    assert torch.equal(logits_of(target, ids, added=additions(list(parts.values()), 8)), logits_of(target, ids))
    with pytest.raises(ValueError, match="exit_layer is 8; expected 1 to 7, for the target has 8 layers"):
        inject_lora(target, 8)
    with pytest.raises(ValueError, match="expected some of q_proj, k_proj, v_proj, o_proj"):
        inject_lora(target, 3, products=("up_proj",))


@pytest.mark.parametrize("products", [("q_proj", "v_proj"), ("k_proj",), ("o_proj",), ("q_proj", "k_proj", "o_proj")])
def test_gradients_flow_through_what_is_added(products: tuple, target: Transformer) -> None:
    """The pass without a cache is that of decoding, and its gradients are those of finite differences."""
    torch.manual_seed(0)
    lora = LayersLoRA(target.shape, range(1, 5), 2, 4.0, products)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(0, 0.2)
    ids = torch.tensor([list(range(2, 12))])

    def loss() -> Tensor:
        hidden = target.layers.read(target.embed(ids), target.rope, None, additions([lora], 8))
        return target.head(hidden)[0].log_softmax(-1)[:, 5].sum()

    through = loss()
    expected = logits_of(target, ids[0].tolist(), added=additions([lora], 8).frozen(torch.float32))
    assert float(through.detach()) == pytest.approx(float(expected.log_softmax(-1)[:, 5].sum()), rel=1e-5)
    through.backward()
    for parameter in list(lora.parameters())[:4]:
        assert parameter.grad is not None
        place = int(parameter.grad.abs().argmax())
        flat, step = parameter.data.view(-1), 1e-2
        old = float(flat[place])
        with torch.no_grad():
            values = []
            for moved in (old + step, old - step):
                flat[place] = moved
                values.append(float(loss()))
            flat[place] = old
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(parameter.grad.view(-1)[place]), rel=0.05)


@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
@pytest.mark.parametrize("name", ["llama", "llama-bias", "qwen2", "qwen3"])
def test_adapters_in_int8(name: str) -> None:
    """A row has the same bits alone and among others, and they are near those of the same layers in float32."""
    from tests.spec_envs.decoding.model.test_int8 import CONFIGS, pair

    int8, reference = pair(CONFIGS[name])
    torch.manual_seed(0)
    lora = LayersLoRA(int8.shape, range(1, 3), 4, 8.0, ("q_proj", "k_proj", "v_proj", "o_proj"))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(0, 0.1)
        added = additions([lora], 3).frozen(torch.float32)
    ids = torch.randint(150, (1, 20))
    with torch.inference_mode():
        together = logits_of(int8, ids[0].tolist(), added=added)
        cache, alone = int8.cache(20), []
        for i in range(20):
            hidden, _ = int8.forward(int8.embed(ids[:, i : i + 1]), cache, torch.tensor([[i]]), added=added)
            cache.length += 1
            alone.append(int8.head(hidden)[0])
        assert torch.equal(together, torch.cat(alone))
        expected = logits_of(reference, ids[0].tolist(), added=added)
        plain = logits_of(reference, ids[0].tolist())
    assert (together - expected).norm() < 0.05 * expected.norm()
    assert (together - expected).norm() < 0.25 * (plain - expected).norm()


@pytest.mark.model
@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_the_real_model_in_int8_keeps_its_text(kind: str) -> None:
    """Token for token, and accepted drafts are among them; with adapted layers, the adapted target's own."""
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


def test_bad_exits(target: Transformer, tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    name = str(tiny_target)
    for keywords, message in (
        ({"exit_layer": 8}, "exit_layer is 8; expected 1 to 7"),
        ({"exit_layer": 0}, "exit_layer is 0; expected 1 to 7"),
        ({"exit_layer": 2, "kind": "tail"}, "adapter is 'tail'; expected one of head, kangaroo, layers"),
        ({"exit_layer": 2, "rank": 0}, "rank is 0; expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            ExitAdapter.fresh(target, name, **keywords)
    with pytest.raises(ValueError, match="drafter is 'exit:two'; expected exit: and a number of layers"):
        load_decoder(name, "exit:two", "cpu", "float32", width=1)
    with pytest.raises(ValueError, match="drafts a chain, not a tree of width 10"):
        load_decoder(name, "exit:2", "cpu", "float32")

    save_exit(trained(target, name, "kangaroo"), tmp_path / "exit")
    with pytest.raises(ValueError, match="whose weights are others than those of this target"):
        load_exit(tmp_path / "exit", load_target(str(tiny_draft), CPU, torch.float32), name)
    for file, damage, message in (
        ("exit.json", "", "exit.json is damaged or missing"),
        ("exit.json", "{}", "exit.json is damaged or missing"),
        ("exit.json", '{"exit_layer": "2"}', "exit.json is damaged or missing"),
        ("attention.safetensors", "not a tensor", "cannot read the exit in"),
        ("exit_proj/adapter_model.safetensors", None, "cannot read the exit in"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "exit", copy, dirs_exist_ok=True)
        (copy / file).unlink() if damage is None else (copy / file).write_text(damage)
        with pytest.raises(ValueError, match=message):
            load_exit(copy, target, name)
    wrong = tmp_path / "exit" / "exit_proj" / "adapter_model.safetensors"
    tensors = load_file(wrong)
    save_file({name: tensor[:-1].clone() for name, tensor in tensors.items()}, wrong)
    with pytest.raises(ValueError, match=r"is \(.*\), expected \(.*\); train it again"):
        load_exit(tmp_path / "exit", target, name)


@pytest.mark.parametrize(
    ("kind", "part", "changes", "message"),
    [
        ("head", "exit_proj", {"use_dora": True}, "use_dora = True, which is not computed"),
        ("head", "exit_proj", {"use_rslora": True}, "use_rslora = True"),
        ("head", "exit_proj", {"lora_alpha": 3}, "lora_alpha = 3, which is not computed; expected 8"),
        ("head", "exit_proj", {"r": 5}, "r = 5"),
        ("head", "exit_proj", {"r": None}, "r = None"),
        ("kangaroo", "exit_proj", {"bias": "all"}, "bias = 'all'"),
        ("layers", "lora_S", {"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2}"),
        ("layers", "lora_D", {"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ("layers", "lora_D", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("layers", "lora_D", {"layers_to_transform": [0, 1]}, "layers_to_transform"),
        ("layers", "lora_S", {"layers_pattern": "blocks"}, "layers_pattern"),
        ("layers", "lora_S", {"target_modules": ["k_proj", "v_proj"]}, "target_modules"),
        ("layers", "lora_S", {"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ("layers", "lora_S", {"lora_bias": True}, "lora_bias = True"),
        ("layers", "lora_S", {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ("layers", "lora_S", {"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ("layers", "lora_S", {"some_future_switch": True}, "some_future_switch = True"),
        ("layers", "lora_S", {"peft_type": "VERA"}, "peft_type = 'VERA'"),
    ],
)
def test_flags_of_peft_that_are_not_computed_are_refused(
    kind: str, part: str, changes: dict, message: str, target: Transformer, tiny_target: Path, tmp_path: Path
) -> None:
    save_exit(trained(target, str(tiny_target), kind), tmp_path)
    path = tmp_path / part / "adapter_config.json"
    said = json.loads(path.read_text())
    again = {"lora_dropout": 0.1, "peft_version": "9", "target_modules": [*reversed(said["target_modules"])]}
    path.write_text(json.dumps(said | again | {"init_lora_weights": "gaussian"}))
    load_exit(tmp_path, target, str(tiny_target))
    path.write_text(json.dumps(said | changes))
    with pytest.raises(ValueError, match=f"cannot read the exit in .*adapter_config.json says {re.escape(message)}"):
        load_exit(tmp_path, target, str(tiny_target))


def test_files_of_an_exit_that_say_more_are_refused(target: Transformer, tiny_target: Path, tmp_path: Path) -> None:
    save_exit(trained(target, str(tiny_target), "head"), tmp_path)
    said = json.loads((tmp_path / "exit.json").read_text())
    stored = {key: said[key] for key in ("base_model", "fingerprint", "exit_layer", "kind", "rank", "shortlist")}
    (tmp_path / "exit.json").write_text(json.dumps(stored | {"scale": 3}))
    with pytest.raises(ValueError, match="nothing reads its scale"):
        load_exit(tmp_path, target, str(tiny_target))
    (tmp_path / "exit.json").write_text(json.dumps(stored))
    for text in ("", "[1]", "{"):
        (tmp_path / "exit_proj" / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"cannot read the exit in .*adapter_config.json is damaged"):
            load_exit(tmp_path, target, str(tiny_target))
    (tmp_path / "exit_proj" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"cannot read the exit in .*adapter_config.json"):
        load_exit(tmp_path, target, str(tiny_target))


def test_a_full_disk_leaves_no_half_of_a_file(
    target: Transformer, tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained(target, str(tiny_target), "layers")
    save_exit(adapter, tmp_path)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with torch.no_grad():
        adapter.lora_S.low_ranks["0-q_proj"].lora_A.add_(1.0)
    write = Path.write_bytes
    for written in range(5):  # files until it is full
        left = iter([True] * written)
        monkeypatch.setattr(Path, "write_bytes", lambda p, data, left=left: (write if next(left, 0) else full)(p, data))
        with pytest.raises(OSError, match=r"^could not write [^:]*: No space left on device; free some [^:]*$"):
            save_exit(adapter, tmp_path)
        assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    assert json.loads((tmp_path / "exit.json").read_text())["kind"] == "layers"
