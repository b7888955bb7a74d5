from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_target
from spec_envs.decoding.weights.files import load_weights
from tests.support.models.tiny import CPU


def test_saved_head_loads_exactly(tiny_drafter: Path, tmp_path: Path) -> None:
    head = EagleHead.load(str(tiny_drafter))
    head.save(tmp_path, torch.float32)
    for (name, a), b in zip(
        head.state_dict().items(), EagleHead.load(str(tmp_path)).state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_vocabulary_includes_tokens_of_the_text(tiny_target: Path, tmp_path: Path) -> None:
    """A head that uses the target's output rows drafts from its shortlist and the tokens of the text so far."""
    target, weights = load_target(str(tiny_target), CPU, "float32"), load_weights(tiny_target)
    EagleHead.from_target(target, weights, torch.arange(8)).save(tmp_path)
    decoder = load_decoder(str(tiny_target), str(tmp_path), "cpu", "float32", width=8)
    text = [3, 12, 9, 12]
    decoder.start(text, 40, np.random.default_rng(0))
    while not decoder.finished:
        decoder.begin()
        vocabulary = decoder.drafter.vocabulary  # type: ignore[union-attr]
        assert set(vocabulary.ids) == set(range(8)) | set(text) | set(decoder.tokens)
        assert set(decoder.tree.tokens) <= set(vocabulary.ids)
        normed = torch.randn(2, target.shape.hidden)
        model = decoder.drafter.model  # type: ignore[union-attr]
        tokens, log_probs, *_ = model.children(normed, len(vocabulary.ids), vocabulary)
        expected = target.head.linear(model.norm(normed))[:, vocabulary.ids].log_softmax(-1)
        order = np.argsort(vocabulary.ids)
        for row in range(2):
            by_id = log_probs[row][np.argsort(tokens[row])]
            assert np.allclose(by_id, expected[row][order], atol=1e-2)
        decoder.expand()
        decoder.verify(12)
    assert len(vocabulary.ids) > 10
