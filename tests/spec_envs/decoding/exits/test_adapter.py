"""Exit adapters: gradients, int8, and a target whose weights never change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spec_envs.decoding.exits.adapter import KINDS, ExitAdapter, inject_lora
from spec_envs.decoding.model.lora import LayersLoRA, additions
from spec_envs.decoding.model.transformer import Transformer
from tests.support.models.adapters import PROMPTS, decode_text, decoder_of, logits_of, random_adapter
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.pairs import CONFIGS, pair


@pytest.mark.parametrize("kind", KINDS)
def test_target_weights_never_change(kind: str, target: Transformer, tiny_target: Path) -> None:
    before = logits_of(target, list(range(2, 14)))
    adapter = random_adapter(target, str(tiny_target), kind)
    other = ExitAdapter.fresh(target, str(tiny_target), 3, kind)
    decoder = decoder_of(adapter)
    decode_text(decoder, PROMPTS[0], [3])
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


def test_inject_lora_splits_layers_at_the_exit(target: Transformer) -> None:
    parts = inject_lora(target, 3, rank=2, alpha=4, products=("k_proj", "o_proj"))
    assert [part.range for part in parts.values()] == [range(3), range(3, 8)] and list(parts) == ["lora_S", "lora_D"]
    ids = list(range(2, 12))
    assert torch.equal(logits_of(target, ids, added=additions(list(parts.values()), 8)), logits_of(target, ids))
    with pytest.raises(ValueError, match="exit_layer is 8; expected 1 to 7, for the target has 8 layers"):
        inject_lora(target, 8)
    with pytest.raises(ValueError, match="expected some of q_proj, k_proj, v_proj, o_proj"):
        inject_lora(target, 3, products=("up_proj",))


@pytest.mark.parametrize("products", [("q_proj", "v_proj"), ("k_proj",), ("o_proj",), ("q_proj", "k_proj", "o_proj")])
def test_gradients_equal_finite_differences(products: tuple, target: Transformer) -> None:
    """The pass without a cache gives the logits of decoding, and its gradients are those of finite differences."""
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
def test_int8_adapter_rows_do_not_depend_on_batch(name: str) -> None:
    """A row has the same bits alone and among others, and they are close to those of the layers in float32."""
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
