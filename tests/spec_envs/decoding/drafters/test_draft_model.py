"""Draft models: greedy text is exact, sampled text has the target's distribution, and the cache is rolled back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from spec_envs.decoding import accept
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.drafters.shortlist import size_of
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.tree import Tree
from spec_envs.decoding.weights.files import load_weights
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.tiny import REAL, WORDS, save_draft
from tests.support.texts import chain_decoder, deviation, plain

VOCAB = len(WORDS)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_text_is_plain_text_under_random_lengths(tiny: dict, tiny_draft: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    decoder, prompt = chain_decoder(tiny, tiny_draft), rng.integers(2, VOCAB, int(rng.integers(1, 40))).tolist()
    expected = plain(tiny, prompt, 80, frozenset())
    decoder.eos = frozenset()
    decoder.start(prompt, 80, rng)
    while not decoder.finished:
        decoder.cycle(int(rng.integers(0, 9)))
    assert decoder.tokens == expected
    accepted = [cycle.accepted for cycle in decoder.cycles]
    assert max(accepted) > 0 and any(c.accepted < c.drafted for c in decoder.cycles)


def test_target_as_its_own_draft_is_always_accepted(tiny: dict, rng: np.random.Generator) -> None:
    """After every kind of cycle the draft model has read the text so far and nothing else."""
    decoder = chain_decoder(tiny, tiny["target"])
    decoder.eos = frozenset()
    decoder.start([3, 4, 5], 300, rng)
    while not decoder.finished:
        k = int(rng.integers(0, 9))
        cycle = decoder.cycle(k)
        assert cycle.accepted == min(k, cycle.emitted) and cycle.drafted == k


def test_rejected_chain_leaves_no_trace_in_cache(tiny: dict, rng: np.random.Generator) -> None:
    """After a rejection at any place the draft model proposes the same as one that reads the text for the first
    time."""
    decoder = chain_decoder(tiny, tiny["target"])
    drafter = decoder.drafter
    assert isinstance(drafter, DraftModelDrafter)
    decoder.eos = frozenset()
    fresh = DraftModelDrafter(drafter.model, decoder.verifier.target)
    for wrong in range(1, 5):
        decoder.start([3, 4, 5], 40, rng)
        for level in range(5):
            decoder.expand() if level else decoder.begin()
            if level == wrong:  # as if the draft model were wrong here
                decoder.tree._tokens[level] = (decoder.tree._tokens[level] + 1) % VOCAB
        accepted = decoder.verify().accepted
        assert accepted == wrong
        decoder.begin()
        fresh.start(decoder.prompt + decoder.tokens, 8, torch.empty(0), rng)
        tree = Tree(1, 7)
        fresh.root(tree)
        assert decoder.tree.tokens[0] == tree.tokens[0] and decoder.tree.scores[0] == pytest.approx(
            tree.scores[0], abs=1e-4
        )


@pytest.mark.parametrize("size", [1, 5, 9, "all"])
def test_drafted_from_the_shortlist_and_the_text(
    tiny: dict, tiny_draft: Path, size: int | str, rng: np.random.Generator
) -> None:
    """A chain's token is the most probable one of the first ids, the ends and the tokens of the text; the text is the
    target's own."""
    decoder, whole = chain_decoder(tiny, f"{tiny_draft}@{size}"), chain_decoder(tiny, f"{tiny_draft}@all")
    ends, decoder.eos = decoder.eos, frozenset()
    decoder.start([11, 4, 13], 60, rng)
    outside = 0
    while not decoder.finished:
        decoder.cycle(1)
        if decoder.finished:
            break
        text = decoder.prompt + decoder.tokens
        allowed = sorted({*range(VOCAB if size == "all" else int(size)), *ends, *text})
        drafter = whole.drafter
        assert isinstance(drafter, DraftModelDrafter)
        ids = torch.tensor([text])
        x, _ = drafter.model.forward(drafter.model.embed(ids), drafter.model.cache(80), torch.arange(len(text))[None])
        logits = drafter.model.head(x[0, -1:])[0]
        decoder.begin()
        assert decoder.tree.tokens[0] == allowed[int(logits[allowed].argmax())]
        log_p = logits[allowed].log_softmax(-1).max()
        assert decoder.tree.scores[0] == pytest.approx(float(log_p), abs=1e-4)
        outside += int(logits.argmax()) not in allowed
    assert outside > 0 or size in (9, "all")
    assert decoder.tokens == plain(tiny, [11, 4, 13], 60, frozenset())


def test_size_of_a_shortlist() -> None:
    assert [size_of("auto", vocab) for vocab in (16, 32_000, 151_936)] == [8192, 8192, 37_984]
    assert [size_of(asked, 32_000) for asked in ("all", 7)] == [32_000, 7]


def test_size_of_a_shortlist_that_is_not_a_draft_models(tiny: dict) -> None:
    with pytest.raises(ValueError, match=r"the shortlist of 'smollm2-135m-draft' is fixed, leave out the @"):
        load_decoder(REAL, "smollm2-135m-draft@100", "cpu", "float32", width=1)
    for name in (f"{tiny['drafter']}@9", "exit:2@9"):
        with pytest.raises(ValueError, match=r"only a whole draft model takes a size of its shortlist after an @"):
            chain_decoder(tiny, name)


@pytest.mark.parametrize(
    ("size", "temperature", "top_p", "alternatives"), [("all", 1.0, 1.0, 0), ("all", 1.0, 1.0, 3), ("6", 0.8, 0.9, 2)]
)
def test_sampled_text_has_the_targets_distribution(
    tiny: dict,
    tiny_draft: Path,
    size: str,
    temperature: float,
    top_p: float,
    alternatives: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = f"{tiny_draft}@{size}"
    assert deviation(tiny, draft, temperature, top_p, alternatives=alternatives) > 0.001
    right = accept.chained

    def without_residual(
        tokens: np.ndarray, parents: np.ndarray, proposals: Any, p: Any, uniform: Any
    ) -> tuple[list[int], int]:
        path, token = right(tokens, parents, proposals, p, uniform)
        rejected = len(path) < len(proposals) and path == list(range(len(path)))
        return path, accept.inverse_cdf(p(len(path)), uniform()) if rejected else token

    monkeypatch.setattr(accept, "chained", without_residual)
    assert deviation(tiny, draft, temperature, top_p, alternatives=alternatives) < 0.001


def test_sampled_chain_cannot_be_verified_in_part(tiny: dict, tiny_draft: Path, rng: np.random.Generator) -> None:
    decoder = chain_decoder(tiny, tiny_draft, temperature=1.0)
    decoder.start([3, 4], 40, rng)
    decoder.expand()
    with pytest.raises(ValueError, match="budget is 1, but 2 tokens were drawn; a drawn chain is verified whole"):
        decoder.verify(1)
    decoder.verify(2)


def test_unsuitable_draft_models_are_refused(
    tiny: dict, tiny_draft: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    assert DrafterName.parse(str(tiny_draft)).chain and not DrafterName.parse(tiny["drafter"]).chain
    with pytest.raises(ValueError, match=r"drafts a chain, not a tree of width 10; pass width=1"):
        load_decoder(tiny["target"], str(tiny_draft), "cpu", "float32")
    with pytest.raises(ValueError, match=r"has another tokenizer than .*; take one of the same family"):
        load_decoder(tiny["target"], REAL, "cpu", "float32", width=1)
    few = save_draft(tmp_path / "few", tiny_draft, vocab_size=VOCAB - 2)
    with pytest.raises(ValueError, match=r"knows 14 of its tokenizer's 16 tokens; take another"):
        chain_decoder(tiny, few)
    short = save_draft(tmp_path / "short", tiny_draft, max_position_embeddings=64)
    decoder = chain_decoder(tiny, short)
    with pytest.raises(ValueError, match="40 tokens and generation may need 25 more, but the context is 64: shorten"):
        decoder.start([3] * 40, 17, rng)
    decoder.eos = frozenset()
    decoder.start([3] * 39, 17, rng)
    while not decoder.finished:
        decoder.cycle(8)


def test_unread_or_invalid_tensors_are_refused(tiny: dict, tmp_path: Path) -> None:
    target = Path(tiny["target"])
    weights = {k: v for k, v in load_weights(target).items() if k.startswith(("model.layers.7.", "model.norm"))}
    kept = {name.replace("layers.7", "layers.0"): tensor for name, tensor in weights.items()}
    kept["shortlist"] = torch.arange(2, 12)
    made = json.loads((target / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text(json.dumps(made))
    ones = torch.ones(32)
    for i, (changes, message) in enumerate(
        (
            ({}, None),
            ({"extra": ones}, "nothing reads the tensors extra"),
            (
                {"model.layers.1.input_layernorm.weight": ones},
                "nothing reads the tensors model.layers.1.input_layernorm",
            ),
            ({"model.layers.0.mlp.router.weight": ones}, "nothing reads the tensors model.layers.0.mlp.router.weight"),
            ({"shortlist": torch.arange(10, 17)}, "shortlist holds ids twice, or others than the target's 16"),
            ({"shortlist": torch.tensor([-1, 3])}, "shortlist holds ids twice, or others"),
            ({"shortlist": torch.tensor([3, 3])}, "shortlist holds ids twice, or others"),
            ({"shortlist": torch.ones(4)}, "shortlist is torch.float32"),
        )
    ):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        save_file(kept | changes, folder / "model.safetensors")
        if message is None:
            chain_decoder(tiny, folder)
            continue
        with pytest.raises(ValueError, match=f"cannot use the draft model in {folder}: {message}"):
            chain_decoder(tiny, folder)


@pytest.mark.parametrize("size", ["all", "9"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("padded", ["draft", "target"])
def test_embeddings_padded_to_different_sizes(
    tiny: dict, tiny_draft: Path, tmp_path: Path, padded: str, temperature: float, size: str, rng: np.random.Generator
) -> None:
    """Models of one family differ in the number of unused rows of their embedding; a target may even emit such a
    token."""
    target, draft = Path(tiny["target"]), tiny_draft
    if padded == "draft":
        draft = save_draft(tmp_path / "padded", target, vocab_size=VOCAB + 9)
    else:
        model = LlamaForCausalLM.from_pretrained(target)
        model.resize_token_embeddings(VOCAB + 9, mean_resizing=False)
        model.save_pretrained(tmp_path / "padded")
        AutoTokenizer.from_pretrained(target).save_pretrained(tmp_path / "padded")
        target = tmp_path / "padded"
    pair = {"target": str(target)}
    decoder = chain_decoder(pair, f"{draft}@{size}", temperature=temperature)
    decoder.eos = frozenset()
    decoder.start([3, 4, 5], 120, rng)
    while not decoder.finished:
        decoder.cycle(4)
    if not temperature:
        assert decoder.tokens == plain(pair, [3, 4, 5], 120, frozenset())
    elif padded == "target":
        assert max(decoder.tokens) >= VOCAB


@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
def test_real_model_in_int8_accepts_its_own_drafts(rng: np.random.Generator) -> None:
    """A token has the same bits alone in the drafter and in a chain in the verifier."""
    decoder = load_decoder(REAL, f"{REAL}@all", "cpu", "int8", width=1, max_depth=7)
    decoder.start(list(range(50, 80)), 60, rng)
    while not decoder.finished:
        cycle = decoder.cycle(5)
        assert cycle.accepted == min(5, cycle.emitted)


@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
@pytest.mark.parametrize("draft", ["smollm2-135m-draft", f"{REAL}@300"])
def test_single_call_drafts_as_separate_calls(draft: str, rng: np.random.Generator) -> None:
    """The whole step in the kernels drafts what the model's parts draft one by one, including tokens only the text
    has."""
    one, many = (load_decoder(REAL, draft, "cpu", "int8", width=1, max_depth=7) for _ in range(2))
    assert isinstance(many.drafter, DraftModelDrafter) and many.drafter.call is not None
    many.drafter.call = None
    prompt = rng.integers(3, 49_000, 60).tolist()
    for decoder in (one, many):
        decoder.start(prompt, 60, rng)
    while not one.finished:
        cycles = [decoder.cycle(5) for decoder in (one, many)]
        assert cycles[0].tokens == cycles[1].tokens
        np.testing.assert_array_equal(cycles[0].nodes.tokens, cycles[1].nodes.tokens)
        np.testing.assert_allclose(cycles[0].nodes.probabilities, cycles[1].nodes.probabilities, rtol=2e-3)
        np.testing.assert_allclose(cycles[0].nodes.entropies, cycles[1].nodes.entropies, atol=2e-3)
    assert one.drafter.vocabulary.rows is not None  # type: ignore[union-attr]


@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
@pytest.mark.parametrize("threads", [1, 2])
def test_proposals_do_not_depend_on_rows_beside_them(threads: int, rng: np.random.Generator) -> None:
    """The children of a row have the same bits alone and with others, on any number of threads, those of the text's
    tokens included."""
    drafter = load_decoder(REAL, f"{REAL}@17", "cpu", "int8", width=1).drafter
    assert isinstance(drafter, DraftModelDrafter)
    drafter.start(rng.integers(3, 49_000, 70).tolist(), 16, torch.empty(0), rng)
    tokens, length, before = rng.integers(3, 49_000, 7).tolist(), drafter.cache.length, torch.get_num_threads()
    alone = [drafter.step([token]) for token in tokens]
    drafter.cache.length = length
    torch.set_num_threads(threads)
    try:
        together = drafter.step(tokens, last=7)
    finally:
        torch.set_num_threads(before)
    assert drafter.vocabulary is not None and (together.tokens > 17).any()
    for name in ("tokens", "log_probs", "entropies"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(children, name) for children in alone]), getattr(together, name)
        )
