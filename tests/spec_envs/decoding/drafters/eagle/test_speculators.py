"""Heads made and saved by the speculators library draft here what the library computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from spec_envs.decoding.drafters.eagle.config import Variant
from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_target
from spec_envs.decoding.weights.files import load_weights
from tests.support.models.heads import states
from tests.support.models.tiny import CPU, WORDS

pytest.importorskip("speculators", reason="`make setup` installs it")
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.convert.eagle.eagle3_converter import Eagle3Converter
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.models.peagle import core as peagle
from speculators.models.peagle.config import PEagleSpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig

VOCAB, LEVELS = len(WORDS), 4
PROMPT = [3, 7, 5, 9, 4, 11, 2]
CLOSE = {"rtol": 1e-5, "atol": 5e-5}  # both sides round in float32, by products that depend on the processor
PARALLEL = {"block": LEVELS, "mask_token_id": 13}


def layer_config(kind: type = LlamaConfig, **changes: Any) -> Any:
    """Return the config of a tiny head's layers."""
    numbers: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return kind(**(numbers | changes))


def library_head(
    folder: Path, target: Path, layers: Any, drafted: int = VOCAB - 3, block: int = 0, **flags: Any
) -> Eagle3DraftModel:
    """Save a random head of the library, a parallel one if it drafts a block, and return it."""
    torch.manual_seed(3)
    about = SpeculatorsConfig(
        algorithm="peagle" if block else "eagle3",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=block or 3)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=str(target), architectures=["LlamaForCausalLM"]),
    )
    layers._attn_implementation = "eager"
    of, kind = (
        (PEagleSpeculatorConfig, peagle.PEagleDraftModel) if block else (Eagle3SpeculatorConfig, Eagle3DraftModel)
    )
    config = of(transformer_layer_config=layers, draft_vocab_size=drafted, speculators_config=about, **flags)
    model = kind(config).float().eval()
    for name, parameter in model.named_parameters():
        spread = 1 + 0.3 * torch.randn_like(parameter) if "norm" in name else 0.3 * torch.randn_like(parameter)
        parameter.data.copy_(spread)
    if drafted < VOCAB:
        ids = torch.randperm(VOCAB)[:drafted].sort().values
        mask = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True)
        model.load_vocab_mappings(mask, ids - torch.arange(drafted))
    model.save_pretrained(folder)
    return model


def from_files(folder: Path, target: Path) -> Eagle3DraftModel:
    """Return a head as the library reads it.

    A head without an embedding gets the target's, as the library documents; this version of transformers would draw one
    at random.
    """
    parallel = json.loads((folder / "config.json").read_text())["speculators_model_type"] == "peagle"
    of, kind = (
        (PEagleSpeculatorConfig, peagle.PEagleDraftModel) if parallel else (Eagle3SpeculatorConfig, Eagle3DraftModel)
    )
    config = of.from_pretrained(str(folder))
    config.transformer_layer_config._attn_implementation = "eager"
    model = kind.from_pretrained(str(folder), config=config).float().eval()
    if "embed_tokens.weight" not in load_weights(folder):
        model.embed_tokens.weight.data.copy_(load_weights(target)["model.embed_tokens.weight"])
    return model


def library_log_probs(
    model: Eagle3DraftModel, target: Path, text: list[int], chain: list[int], at: list[int]
) -> Tensor:
    """Return the library's log-probabilities after a text and after each token of a chain, ``[levels, draft
    vocabulary]``."""
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out))
    features = states(target, [*text, *chain], at, torch.float32)[None, :-1]
    ids = torch.tensor([[*text, *chain]])[:, 1:]
    with torch.no_grad():
        model(features, ids, torch.zeros_like(ids), ttt_steps=len(chain) + 1)
    hook.remove()
    row = len(text) - 2  # this row reads the states of the second-last token, and the last token
    return torch.stack([logits[0, row] for logits in seen]).double().log_softmax(-1)


def block_log_probs(model: peagle.PEagleDraftModel, target: Path, text: list[int], block: int, at: list[int]) -> Tensor:
    """Return the library's log-probabilities at every position of the block after a text, ``[block, draft
    vocabulary]``."""
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out))
    rows, width = len(text) - 1, len(text) - 1 + block
    features = states(target, text, at, torch.float32)[:-1]
    features = torch.cat([features, torch.zeros(block, features.shape[1])])[None]
    ids = torch.tensor([[*text[1:], *[0] * block]])
    anchors = torch.cat([torch.arange(rows), torch.full((block - 1,), rows - 1)])
    depths = torch.cat([torch.zeros(rows, dtype=torch.long), torch.arange(1, block)])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(peagle, "generate_cod_sample_indices", lambda **_: (anchors, depths))
        patch.setattr(peagle, "compute_metrics", lambda **_: (None, {}))
        model(
            features, ids, torch.zeros_like(ids), verifier_last_hidden_states=torch.zeros(1, width, model.hidden_size)
        )
    hook.remove()
    return seen[0][0, rows - 1 :].double().log_softmax(-1)


def assert_same_drafts(head: Path, model: Eagle3DraftModel, target: Path, at: list[int]) -> None:
    """Assert that the drafted chain and the whole first distribution are those of the library."""
    drafted = model.config.draft_vocab_size
    chain_decoder = load_decoder(str(target), str(head), "cpu", "float32", width=1, max_depth=LEVELS)
    chain_decoder.start(PROMPT, 40, np.random.default_rng(0))
    chain_decoder.begin()
    for _ in range(LEVELS - 1):
        chain_decoder.expand()
    text, tree = [*PROMPT, *chain_decoder.tokens], chain_decoder.tree
    chain = tree.tokens.tolist()
    if isinstance(model, peagle.PEagleDraftModel):
        expected = block_log_probs(model, target, text, len(chain), at)
    else:
        expected = library_log_probs(model, target, text, chain[:-1], at)
    ids = torch.arange(drafted) if model.d2t is None else torch.arange(drafted) + model.d2t
    assert ids[expected.argmax(-1)].tolist() == chain
    steps = np.diff(tree.scores, prepend=0.0)
    np.testing.assert_allclose(steps, expected.max(-1).values, **CLOSE)
    np.testing.assert_allclose(np.concatenate(tree.entropies), -(expected.exp() * expected).sum(-1), **CLOSE)

    wide = load_decoder(str(target), str(head), "cpu", "float32", width=drafted)
    wide.start(PROMPT, 40, np.random.default_rng(0))
    wide.begin()  # all tokens that can be drafted after the text
    found = dict(zip(wide.tree.tokens.tolist(), wide.tree.scores, strict=True))
    np.testing.assert_allclose([found[i] for i in ids.tolist()], expected[0], **CLOSE)


CASES: dict[str, tuple[Any, dict[str, Any], list[int]]] = {
    "plain": (layer_config(), {"norm_before_residual": False}, [2, 4, 5]),
    "residual": (layer_config(), {"norm_before_residual": True}, [2, 4, 5]),
    "3.1": (layer_config(), {"norm_before_residual": True, "fc_norm": True, "norm_output": True}, [2, 4, 5]),
    "before-fc": (layer_config(), {"norm_before_fc": True, "norm_output": True}, [2, 4, 5]),
    "last": (layer_config(), {"eagle_aux_hidden_state_layer_ids": [1, 4, 8]}, [1, 4, 8]),
    "one": (layer_config(), {"eagle_aux_hidden_state_layer_ids": [7], "fc_norm": True}, [7]),
    "five": (layer_config(), {"eagle_aux_hidden_state_layer_ids": [0, 2, 3, 5, 8]}, [0, 2, 3, 5, 8]),
    "deep": (layer_config(num_hidden_layers=3), {"norm_before_residual": True}, [2, 4, 5]),
    "biased": (layer_config(attention_bias=True, mlp_bias=True), {}, [2, 4, 5]),
    "qwen3": (layer_config(Qwen3Config, attention_bias=True), {"norm_before_residual": True}, [2, 4, 5]),
    "qwen3-deep": (layer_config(Qwen3Config, num_hidden_layers=2, head_dim=16), {"norm_output": True}, [2, 4, 5]),
    "whole": (layer_config(), {"drafted": VOCAB}, [2, 4, 5]),
    "parallel": (layer_config(), PARALLEL, [2, 4, 5]),
    "parallel-3.1": (layer_config(), PARALLEL | {"fc_norm": True, "norm_output": True}, [2, 4, 5]),
    "parallel-deep": (layer_config(num_hidden_layers=4), PARALLEL | {"norm_before_residual": True}, [2, 4, 5]),
    "parallel-qwen3": (layer_config(Qwen3Config), PARALLEL | {"norm_before_fc": True}, [2, 4, 5]),
    "parallel-two": (layer_config(), PARALLEL | {"eagle_aux_hidden_state_layer_ids": [1, 8]}, [1, 8]),
    "llama3": (
        layer_config(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        ),
        {},
        [2, 4, 5],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_drafts_equal_those_of_the_library(case: str, tiny_target: Path, tmp_path: Path) -> None:
    layers, flags, at = CASES[case]
    model = library_head(tmp_path, tiny_target, layers, **flags)
    assert_same_drafts(tmp_path, model, tiny_target, at)


def test_missing_embedding_is_the_targets(tiny_target: Path, tmp_path: Path) -> None:
    library_head(tmp_path, tiny_target, layer_config())
    weights = {name: tensor for name, tensor in load_weights(tmp_path).items() if name != "embed_tokens.weight"}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_drafts(tmp_path, from_files(tmp_path, tiny_target), tiny_target, [2, 4, 5])


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_library_reads_saved_parallel_head(kind: type, tiny_target: Path, tmp_path: Path) -> None:
    flags = PARALLEL | {"fc_norm": True, "norm_before_residual": True, "eagle_aux_hidden_state_layer_ids": [1, 4, 8]}
    made = library_head(tmp_path / "theirs", tiny_target, layer_config(kind, num_hidden_layers=2), **flags)
    EagleHead.load(str(tmp_path / "theirs")).save(tmp_path / "ours", torch.float32)
    assert_same_drafts(tmp_path / "ours", made, tiny_target, [1, 4, 8])
    assert_same_drafts(tmp_path / "ours", from_files(tmp_path / "ours", tiny_target), tiny_target, [1, 4, 8])


def test_new_parallel_head_is_read_by_the_library(tiny_target: Path, tmp_path: Path) -> None:
    target = load_target(str(tiny_target), CPU, "float32")
    variant = Variant(boundaries=(2, 4, 5), mask_token=15, block=LEVELS, verifier=str(tiny_target))
    head = EagleHead.from_target(target, load_weights(tiny_target), torch.arange(13), variant)
    with torch.no_grad():
        head.mask_hidden.normal_(generator=torch.Generator().manual_seed(1))
    head.save(tmp_path, torch.float32)
    assert DrafterName.parse(str(tmp_path)).kind == "parallel"
    model = from_files(tmp_path, tiny_target)
    assert model.config.speculators_config.proposal_methods[0].speculative_tokens == LEVELS
    assert_same_drafts(tmp_path, model, tiny_target, [2, 4, 5])


def test_library_converts_saved_head(tiny_target: Path, tmp_path: Path) -> None:
    """The library finds every key that it reads under its own name."""
    place = shutil.copytree(tiny_target, tmp_path / "target")
    config = json.loads((place / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 300.0
    (place / "config.json").write_text(json.dumps(config))
    target = load_target(str(place), CPU, "float32")
    head = EagleHead.from_target(target, load_weights(place), torch.arange(13))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    head.save(tmp_path / "ours", torch.float32)
    Eagle3Converter().convert(tmp_path / "ours", tmp_path / "theirs", str(place), validate=False)
    model = from_files(tmp_path / "theirs", place)
    assert_same_drafts(tmp_path / "ours", model, place, [2, 4, 5])
    assert_same_drafts(tmp_path / "theirs", model, place, [2, 4, 5])
