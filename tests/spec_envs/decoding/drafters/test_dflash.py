"""DFlash drafters made by the speculators library and by transformers draft here what these compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.files import load_weights
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.heads import random_target, states
from tests.support.models.tiny import WORDS
from tests.support.texts import deviation, plain_text

pytest.importorskip("speculators", reason="`make setup` installs it")
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models.dflash import core
from speculators.models.dflash.config import DFlashSpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig

VOCAB, SIZE, MASK = len(WORDS), 5, 15
PROMPT = [3, 7, 5, 9, 4, 11, 2]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # both sides round in float32


def numbers(**changes: Any) -> dict[str, Any]:
    """Return the numbers of a tiny drafter's layers."""
    return {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    } | changes


def randomised(model: torch.nn.Module) -> Any:
    """Draw all parameters of a model, and return it."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + drawn if "norm" in name else drawn)
    return model.float().eval()


def library_drafter(
    folder: Path, target: Path, layers: Any, drafted: int = VOCAB, **flags: Any
) -> core.DFlashDraftModel:
    """Save a random drafter of the speculators library, and return it."""
    about = SpeculatorsConfig(
        algorithm="dflash",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=SIZE - 1)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=str(target), architectures=["LlamaForCausalLM"]),
    )
    layers._attn_implementation = "eager"
    keys = {"block_size": SIZE, "mask_token_id": MASK, "aux_hidden_state_layer_ids": [2, 4, 5]} | flags
    config = DFlashSpeculatorConfig(
        transformer_layer_config=layers, draft_vocab_size=drafted, speculators_config=about, **keys
    )
    model = randomised(core.DFlashDraftModel(config))
    if drafted < VOCAB:
        ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))[:drafted].sort().values
        mask = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True)
        model.load_vocab_mappings(mask, ids - torch.arange(drafted))
    model.save_pretrained(folder)
    weights = load_weights(target)["model.embed_tokens.weight"]  # the tiny target's output rows, too
    model.embed_tokens.weight.data.copy_(weights)
    if drafted == VOCAB:
        model.lm_head.weight.data.copy_(weights)
    return model


def library_log_probs(model: core.DFlashDraftModel, target: Path, text: list[int]) -> Tensor:
    """Return the library's log-probabilities at every position of the block after a text."""
    anchor, seen = len(text) - 1, []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out))
    features = states(target, text, model.target_layer_ids, torch.float32)
    padded = torch.cat([features, torch.zeros(SIZE, features.shape[1])])[None]
    ids = torch.tensor([[*text, *[0] * SIZE]])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(core, "select_anchors", lambda *_: (torch.tensor([anchor]), torch.ones(1, dtype=torch.bool)))
        last = torch.zeros(1, ids.shape[1], model.hidden_size)
        model._backbone_forward(padded, ids, torch.ones_like(ids), last, torch.zeros_like(ids), max_anchors=1)
    hook.remove()
    found = next(out for out in seen if out.shape[1] == SIZE)[0]
    return found[0 if model.config.sample_from_anchor else 1 :].double().log_softmax(-1)


def assert_drafts(folder: Path, target: Path, ids: Tensor, expected: Any) -> None:
    """Assert that chains and trees are drafted by the log-probabilities that ``expected`` returns after a text."""
    for width in (1, 3):
        decoder = load_decoder(str(target), str(folder), "cpu", "float32", width=width, max_depth=12)
        decoder.start(PROMPT, 40, np.random.default_rng(0))
        for accepted in (0, 2, 1):  # the second and third block follow a text that grew
            log_probs = expected([*PROMPT, *decoder.tokens])
            while decoder.expand():
                pass
            tree = decoder.tree
            assert len(tree.level_starts) == len(log_probs)
            best = log_probs.topk(width).values
            first = tree.tokens[:width], tree.scores[:width]
            assert first[0].tolist() == ids[log_probs[0].topk(width).indices].tolist()
            np.testing.assert_allclose(first[1], best[0], **CLOSE)
            np.testing.assert_allclose(tree.last_level.max(), best[:, 0].sum(), rtol=1e-5, atol=5e-5)
            entropies = -(log_probs.exp() * log_probs).sum(-1)
            np.testing.assert_allclose([float(level[0]) for level in tree.entropies], entropies, **CLOSE)
            decoder.verify(accepted)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Qwen3Config(**numbers()), {}),
    "shortlist": (Qwen3Config(**numbers(attention_bias=True)), {"drafted": VOCAB - 3}),
    "llama": (LlamaConfig(**numbers(num_hidden_layers=1)), {"aux_hidden_state_layer_ids": [1, 8]}),
    "unordered": (Qwen3Config(**numbers()), {"aux_hidden_state_layer_ids": [6, 2, 7]}),
    "anchor": (Qwen3Config(**numbers()), {"sample_from_anchor": True}),
    "sliding": (
        Qwen3Config(
            **numbers(sliding_window=64, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])
        ),
        {},
    ),
    "sliding-both": (
        Qwen3Config(**numbers(sliding_window=64, use_sliding_window=True, layer_types=["sliding_attention"] * 2)),
        {"sliding_window_non_causal": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_drafts_equal_those_of_the_library(case: str, tiny_target: Path, tmp_path: Path) -> None:
    layers, flags = CASES[case]
    model = library_drafter(tmp_path, tiny_target, layers, **flags)
    assert DrafterName.parse(str(tmp_path)).kind == "dflash"
    ids = torch.arange(VOCAB) if model.d2t is None else torch.arange(len(model.d2t)) + model.d2t
    assert_drafts(tmp_path, tiny_target, ids, lambda text: library_log_probs(model, tiny_target, text))


def save_flat(folder: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    """Save a drafter in z-lab's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        **numbers(),
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "layer_types": ["full_attention"] * 2,
        "max_window_layers": 2,
        "use_sliding_window": False,
        "block_size": SIZE,
        "num_target_layers": 8,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [1, 3, 4]},
    }
    (folder / "config.json").write_text(json.dumps(written | changes))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


def flat_state(folder: Path, target: Path) -> dict[str, Tensor]:
    """Return the tensors of a random drafter as z-lab names them."""
    library_drafter(folder, target, Qwen3Config(**numbers()))
    own = ("d2t", "t2d", "embed_tokens.weight", "lm_head.weight")
    return {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in own}


def test_drafts_equal_those_of_transformers(tiny_target: Path, tmp_path: Path) -> None:
    """The DFlash model of transformers has these layers under other names."""
    theirs = pytest.importorskip("transformers.models.muse_glimmer_assistant", reason="added in transformers 5.23")
    config = theirs.MuseGlimmerAssistantConfig(
        **numbers(),
        target_layer_ids=[1, 3, 4],
        block_size=SIZE,
        mask_token_id=MASK,
        rms_norm_eps=1e-6,
        layer_types=["full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    model = randomised(theirs.MuseGlimmerAssistantModel(config))
    names = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}
    state = {names.get(name, name): tensor for name, tensor in model.state_dict().items() if "rotary" not in name}
    embedding = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).get_input_embeddings().weight

    def expected(text: list[int]) -> Tensor:
        block = torch.tensor([[text[-1], *[MASK] * (SIZE - 1)]])
        features = states(tiny_target, text[:-1], [2, 4, 5], torch.float32)[None]
        with torch.no_grad():
            hidden = model(embedding[block], features, position_ids=torch.arange(len(text) - 1 + SIZE)[None])[0][0, 1:]
            return (hidden @ embedding.T).double().log_softmax(-1)

    assert_drafts(save_flat(tmp_path, state), tiny_target, torch.arange(VOCAB), expected)


def test_layouts_draft_the_same(tiny_target: Path, tmp_path: Path) -> None:
    state = flat_state(tmp_path / "speculators", tiny_target)
    save_flat(tmp_path / "flat", state)
    two = {f"model.{name}": tensor[:, :64] if name == "fc.weight" else tensor for name, tensor in state.items()}
    save_flat(tmp_path / "spread", two, dflash_config={"mask_token_id": MASK})
    save_flat(tmp_path / "named", two, dflash_config={"mask_token_id": MASK, "target_layer_ids": [1, 5]})
    scores = {}
    for name in ("speculators", "flat", "spread", "named"):
        decoder = load_decoder(str(tiny_target), str(tmp_path / name), "cpu", "float32", width=3)
        decoder.start(PROMPT, 40, np.random.default_rng(0))
        decoder.expand()
        scores[name] = decoder.tree.scores.copy()
    np.testing.assert_allclose(scores["speculators"], scores["flat"], **CLOSE)
    np.testing.assert_allclose(scores["spread"], scores["named"], **CLOSE)
    assert np.abs(scores["spread"] - scores["flat"]).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"block_size": None}, {}, "block_size"),
        ({"block_size": 1}, {}, "block_size"),
        ({"dflash_config": {"target_layer_ids": [1, 3, 4]}}, {}, "mask_token_id"),
        (
            {"dflash_config": {"mask_token_id": 16, "target_layer_ids": [1, 3, 4]}},
            {},
            "is 16, expected a token below 16",
        ),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 3, 8]}}, {}, r"boundaries \[2, 4, 9\]"),
        ({"dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 3, 3]}}, {}, "are not different"),
        ({"dflash_config": {"mask_token_id": 3, "causal_head": True}}, {}, "dflash_config: causal_head is True"),
        ({"dflash_config": {"mask_token_id": 3}, "num_target_layers": None}, {}, "it has no target_layer_ids"),
        (
            {"dflash_config": {"mask_token_id": 3}, "num_target_layers": 10**400},
            {},
            "num_target_layers is 10+[.]{3}$",  # too large for a float
        ),
        ({"hidden_act": "q" * 100_000}, {}, "hidden_act is 'q+[.]{3}"),
        ({"vocab_size": 1 << 24}, {}, "vocab_size is 16777216: Expected `int` <= 1048576"),  # before tables are made
        ({}, {"model.norm.weight": torch.ones(32)}, "tensors of one name with and without 'model.'"),
        ({"new_norm": 3}, {}, "new_norm is 3, a key that is not known here"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, {}, "sliding attention are not computed"),
        ({"layer_types": ["linear_attention"] * 2}, {}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3}, {}, "layer_types names 3 layers, expected 2"),
        ({"hidden_size": 48}, {}, r"fc.weight is \(32, 96\), but \(48, 144\) would fit"),
        ({"vocab_size": 20}, {}, "vocabulary is 20, the target's is 16"),
        ({}, {"extra.weight": torch.ones(3)}, "nothing reads the tensors extra.weight"),
        ({}, {"norm.weight": torch.full((32,), torch.nan)}, "norm.weight holds numbers that are not finite"),
        ({"architectures": ["DFlash2DraftModel"]}, {}, "a DFlash 2 drafter, which is not read"),
        ({"architectures": ["Qwen3DSparkModel"]}, {}, "a DSpark drafter, which is not read"),
    ],
)
def test_unsupported_drafters_are_refused_by_name(
    changes: dict, tensors: dict, message: str, tiny_target: Path, tmp_path: Path
) -> None:
    state = flat_state(tmp_path / "made", tiny_target)
    folder = save_flat(tmp_path / "changed", state | tensors, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_decoder(str(tiny_target), str(folder), "cpu", "float32", width=1)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_drafts_in_every_dtype(dtype: str, tiny_target: Path, tmp_path: Path) -> None:
    """Drafts of other dtypes are close to those of float32, and the text is that of plain decoding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    place = random_target(tmp_path / "target", tiny_target, **sizes, initializer_range=0.1)
    library_drafter(tmp_path / "drafter", place, Qwen3Config(**numbers(**sizes)))
    decoders = [load_decoder(str(place), str(tmp_path / "drafter"), "cpu", d, width=13) for d in ("float32", dtype)]
    for decoder in decoders:
        decoder.start(PROMPT, 40, np.random.default_rng(0))
        decoder.begin()
    first = [dict(zip(d.tree.tokens.tolist(), d.tree.scores, strict=True)) for d in decoders]
    shared = sorted(first[0].keys() & first[1].keys())
    assert len(shared) > 10 and np.corrcoef([[found[token] for token in shared] for found in first])[0, 1] > 0.99
    if dtype == "bfloat16":
        return  # its texts differ at near ties
    rng, decoder = np.random.default_rng(1), decoders[1]
    for _ in range(3):
        prompt = rng.integers(2, 16, 9).tolist()
        text = plain_text(decoder, prompt, 50)
        decoder.start(prompt, 50, rng)
        while not decoder.finished:
            for _ in range(rng.integers(0, 5)):
                decoder.expand()
            decoder.verify(int(rng.integers(0, 30)))
        assert decoder.tokens == text


def test_sampled_text_has_the_targets_distribution(tiny_target: Path, tmp_path: Path) -> None:
    folder = save_flat(tmp_path / "flat", flat_state(tmp_path / "made", tiny_target))
    settings = {"tokens": 1000, "width": 3, "max_depth": 3}
    assert deviation({"target": str(tiny_target)}, folder, 0.9, 0.95, **settings) > 0.001


def test_rows_of_the_forward_are_charged(tiny_target: Path, tmp_path: Path) -> None:
    """A forward reads the states of the unread tokens, and the block after them; deeper levels are free."""
    folder = save_flat(tmp_path / "flat", flat_state(tmp_path / "made", tiny_target))
    decoder = load_decoder(str(tiny_target), str(folder), "cpu", "float32", width=2, max_depth=2)
    decoder.eos = frozenset()
    decoder.start(PROMPT, 40, np.random.default_rng(0))
    for steps in (0, 2):  # tokens that were emitted without drafts
        for _ in range(steps):
            decoder.verify(0)
        assert decoder.expand() and decoder.expand() and not decoder.expand()
        decoder.verify(0)
    rows = {rows: times for (part, rows), times in decoder.clock.forwards.items() if part == "draft" and rows}
    assert rows == {1 + SIZE: 1, 3 + SIZE: 1}
