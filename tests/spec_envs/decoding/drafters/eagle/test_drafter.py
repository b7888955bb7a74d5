from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from spec_envs.decoding.drafters.eagle.drafter import captured_layers
from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.model.batch import read_batch
from spec_envs.decoding.weights.checkpoints import load_target
from spec_envs.decoding.weights.files import load_weights
from spec_envs.experiments.drafters import training as drafter_training
from spec_envs.experiments.drafters.batches import Batch, drafted_rows
from spec_envs.experiments.drafters.eagle_objective import Objective, Unrolled
from spec_envs.experiments.drafters.recording import Example, load_shard, record
from spec_envs.experiments.drafters.training import report, train
from tests.support.models.tiny import CPU
from tests.support.texts import plain_text


def test_unrolled_training_equals_drafting(tiny_target: Path, tiny_drafter: Path) -> None:
    """Row t of the unrolled head gives the same probabilities as the drafter at the same place in the same chain."""
    target, head = load_target(str(tiny_target), CPU, "float32"), EagleHead.load(str(tiny_drafter))
    decoder = load_decoder(str(tiny_target), str(tiny_drafter), "cpu", "float32", width=1)
    prompt = [3, 7, 5, 9, 4, 11, 2]
    decoder.start(prompt, 40, np.random.default_rng(0))
    for _ in range(5):
        decoder.expand()
    chain, scores = decoder.tree.tokens.tolist(), decoder.tree.scores
    text = [*prompt, *decoder.tokens, *chain]
    features, final = read_batch(target, [text], captured_layers(8))
    batch = Batch.of([Example(torch.tensor(text), len(prompt), features[0], final[0])], CPU)
    row = len(prompt) - 1
    rows = torch.tensor([[row, row + 1]])
    with torch.no_grad():
        for step, hidden in enumerate(Unrolled(head, target.embedding_weight(), 64)(batch, 6, rows)):
            log_probs = head.lm_head(hidden[0, row if step == 0 else 0]).log_softmax(-1)
            expected = scores[step] - (scores[step - 1] if step else 0.0)
            assert head.draft_ids[log_probs.argmax()] == chain[step]
            assert abs(float(log_probs.max()) - expected) < 1e-4


def test_drafted_rows_lie_inside_the_answer() -> None:
    batch = Batch(torch.zeros(1, 8, dtype=torch.long), *[torch.zeros(1)] * 2, torch.tensor([7]), torch.tensor([3]))
    assert drafted_rows(batch, 0)[0].nonzero()[:, 0].tolist() == [2, 3, 4]
    assert drafted_rows(batch, 2)[0].nonzero()[:, 0].tolist() == [2]


def test_training_improves_and_resumes_exactly(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, weights = load_target(str(tiny_target), CPU, "float32"), load_weights(tiny_target)
    rng = random.Random(0)
    texts = []
    for _ in range(40):
        decoder = load_decoder(str(tiny_target), None, "cpu", "float32")
        decoder.eos = frozenset()
        prompt = [rng.randrange(2, 16) for _ in range(6)]
        texts.append((prompt + plain_text(decoder, prompt, 30), 6))
    capture = (2, 4, 5)
    paths = record(target, texts, tmp_path / "recorded", capture)
    assert len(load_shard(paths[0])) == 40
    before = paths[0].stat().st_mtime_ns
    assert record(target, texts, tmp_path / "recorded", capture) == paths and paths[0].stat().st_mtime_ns == before

    def objective() -> Objective:
        torch.manual_seed(0)
        head = EagleHead.from_target(target, weights, torch.arange(16))
        return Objective(Unrolled(head, target.embedding_weight(), 64), target.output_weight(), torch.float32)

    untrained = report(objective(), paths, depth=4)
    settings = {"steps": 3, "batch_tokens": 256, "peak": 3e-3, "share": 1.0, "seed": 0}
    straight = objective()
    train(straight, paths, tmp_path / "a.pt", epochs=40, **settings)
    trained = report(straight, paths, depth=4)
    assert trained.chain_acceptance[0] > untrained.chain_acceptance[0] + 0.1
    assert trained.chain_acceptance == sorted(trained.chain_acceptance, reverse=True)

    monkeypatch.setattr(drafter_training, "CHECKPOINT_EVERY", 7)
    killed, passes = objective(), []

    def kill(*_: object) -> None:
        passes.append(1)
        if len(passes) == 30:
            raise KeyboardInterrupt

    killed.model.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        train(killed, paths, tmp_path / "b.pt", epochs=40, **settings)
    resumed = objective()
    train(resumed, paths, tmp_path / "b.pt", epochs=40, **settings)
    for a, b in zip(straight.model.head.parameters(), resumed.model.head.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "b.pt").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"cannot continue from .*b.pt.*; delete it"):
        train(objective(), paths, tmp_path / "b.pt", epochs=40, **settings)


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
        tokens, log_probs, _, _ = model.children(normed, len(vocabulary.ids), vocabulary)
        expected = target.head.linear(model.norm(normed))[:, vocabulary.ids].log_softmax(-1)
        order = np.argsort(vocabulary.ids)
        for row in range(2):
            by_id = log_probs[row][np.argsort(tokens[row])]
            assert np.allclose(by_id, expected[row][order], atol=1e-2)
        decoder.expand()
        decoder.verify(12)
    assert len(vocabulary.ids) > 10
