"""What a drafter learns from is what it reads in use, and the loss is the cross-entropy that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.eagle.config import Variant
from spec_envs.decoding.drafters.eagle.drafter import captured_layers
from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.model.batch import read_batch
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import load_target
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.experiments.drafters.batches import Batch
from spec_envs.experiments.drafters.distillation import Distillation, Student
from spec_envs.experiments.drafters.distilled import CHUNK, Distilled
from spec_envs.experiments.drafters.eagle_objective import EagleObjective, Unrolled
from spec_envs.experiments.drafters.narrowing import narrowed
from spec_envs.experiments.drafters.parallel_objective import Blocks, ParallelObjective
from tests.support.models.tiny import CPU

PROMPT = [3, 7, 5, 9, 4, 11, 2]
OTHER = [6, 2, 8, 13, 3]  # a text that stands before in the batch
DEPTHS = 5


@pytest.fixture
def target(tiny_target: Path) -> Transformer:
    return load_target(str(tiny_target), CPU, "float32")


def batch_of(target: Transformer, texts: Sequence[list[int]], answers: Sequence[int]) -> Batch:
    """Return a batch of texts with the target's states as they are."""
    states = [read_batch(target, [text], captured_layers(8)) for text in texts]
    features, final = (torch.cat([state[i][0] for state in states]) for i in range(2))
    return Batch(
        torch.tensor([token for text in texts for token in text]),
        features,
        final,
        [len(text) for text in texts],
        answers,
    )


def drafted(folder: Path, target: Path) -> tuple[Decoder, list[float]]:
    """Return a decoder that drafted a chain after the prompt, and the log-probabilities of its tokens."""
    decoder = load_decoder(str(target), str(folder), "cpu", "float32", width=1)
    decoder.start(PROMPT, 40, np.random.default_rng(0))
    for _ in range(DEPTHS):
        decoder.expand()
    return decoder, np.diff(decoder.tree.scores, prepend=0.0).tolist()


def check_chain(logits: Sequence[Tensor], ids: Tensor, chain: list[int], log_probs: list[float]) -> None:
    """Compare the logits ``[draft_vocab]`` of every place of a chain with what was drafted there."""
    assert len(logits) == len(chain) >= DEPTHS
    for row, token, expected in zip(logits, chain, log_probs, strict=True):
        found = row.log_softmax(-1)
        assert ids[found.argmax()] == token
        assert abs(float(found.max()) - expected) < 1e-4


@torch.no_grad()
def test_unrolled_head_is_the_drafter(tiny_target: Path, tiny_drafter: Path, target: Transformer) -> None:
    decoder, log_probs = drafted(tiny_drafter, tiny_target)
    head, chain = EagleHead.load(str(tiny_drafter)), decoder.tree.tokens.tolist()
    batch = batch_of(target, [OTHER, [*PROMPT, *decoder.tokens, *chain]], [2, len(PROMPT)])
    row = len(OTHER) + len(PROMPT) - 1
    rows = torch.tensor([1, row, row + 1])
    steps = Unrolled(head, target.embedding_weight(), 64)(batch, len(chain), torch.tensor([0, 1, row, row + 1]), rows)
    logits = [head.lm_head(hidden[2 if step == 0 else 1]) for step, hidden in enumerate(steps)]
    check_chain(logits, head.draft_ids, chain, log_probs)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_blocks_are_the_drafter(layers: int, tiny_target: Path, target: Transformer, tmp_path: Path) -> None:
    weights = narrowed(load_weights(tiny_target), 40)
    variant = Variant(mask_token=15, block=6)
    head = EagleHead.from_target(target, weights, torch.arange(14), variant, layers)
    head.mask_hidden.normal_(generator=torch.Generator().manual_seed(2))
    head.save(tmp_path, torch.float32)
    decoder, log_probs = drafted(tmp_path, tiny_target)
    chain = decoder.tree.tokens.tolist()
    text = [*PROMPT, *decoder.tokens]
    batch = batch_of(target, [OTHER, [*text, *[2] * len(chain)]], [2, len(PROMPT)])  # what follows is not read
    row = len(OTHER) + len(PROMPT) - 1
    anchors = torch.tensor([1, 1, *[row] * (len(chain) - 1), row + 1])
    depths = torch.tensor([1, 2, *range(1, len(chain)), 1])
    hidden, masks = Blocks(head, target.embedding_weight(), 64)(batch, torch.tensor([0, row]), anchors, depths)
    check_chain(list(head.lm_head(torch.cat([hidden[1:], masks[2:-1]]))), head.draft_ids, chain, log_probs)


@torch.no_grad()
def test_student_is_the_drafter(tiny_target: Path, target: Transformer, tmp_path: Path) -> None:
    config = load_config(tiny_target)
    config.intermediate_size = 40
    weights = narrowed(load_weights(tiny_target), 40)
    student = Student.from_target(config, weights, target, 3, torch.arange(14))
    student.save(tmp_path, torch.float32)
    decoder, log_probs = drafted(tmp_path, tiny_target)
    chain = decoder.tree.tokens.tolist()
    batch = batch_of(target, [OTHER, [*PROMPT, *decoder.tokens, *chain]], [2, len(PROMPT)])
    row = len(OTHER) + len(PROMPT)
    hidden = student(batch)[row : row + len(chain)]
    check_chain(list(hidden @ target.output_weight()[:14].T), torch.arange(14), chain, log_probs)


def test_loss_is_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, final, rows = torch.randn(CHUNK + 9, 8, requires_grad=True), torch.randn(CHUNK + 9, 8), torch.randn(20, 8)
    loss, best = Distilled.apply(hidden, final, rows)
    logits = hidden @ rows.T
    expected = F.cross_entropy(logits, (final @ rows.T).softmax(-1), reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert torch.equal(best, logits.argmax(-1))
    found, wanted = (torch.autograd.grad(3 * value, hidden, retain_graph=True)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_rows_of_answers() -> None:
    """Text of 7 tokens whose answer begins at 3, behind one of 4."""
    ids = torch.tensor([1, 2, 1, 2, 5, 6, 5, 7, 7, 6, 8])
    batch = Batch(ids, torch.empty(0), torch.empty(0), [4, 7], [3, 3])
    assert batch.drafting(0).nonzero()[:, 0].tolist() == [6, 7, 8]
    assert batch.drafting(-1).nonzero()[:, 0].tolist() == [2, 6, 7, 8, 9]
    assert batch.drafting(2).nonzero()[:, 0].tolist() == [6]
    assert batch.first.tolist() == [0, 1, 0, 1, 0, 1, 0, 3, 3, 1, 6]
    assert batch.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]


def scored(
    objective: EagleObjective | ParallelObjective | Distillation, batch: Batch
) -> tuple[list[float], list[float]]:
    with torch.no_grad():
        scores = objective(batch, 4, 1.0, torch.Generator().manual_seed(0), 0.5)
    assert torch.isfinite(scores.loss)
    return scores.survived.tolist(), scores.counted.tolist()


def test_right_chains_are_counted(tiny_target: Path, target: Transformer) -> None:
    """A draft model of all layers but one is right as often as comparing token by token says."""
    config, weights = load_config(tiny_target), load_weights(tiny_target)
    student = Student.from_target(config, weights, target, 7, torch.arange(16))
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 16, n).tolist() for n in (14, 9, 20)]
    batch = batch_of(target, texts, [3, 4, 6])
    survived, counted = scored(Distillation(student, target, torch.float32), batch)
    with torch.no_grad():
        best = (student(batch) @ target.output_weight().T).argmax(-1).split([len(text) for text in texts])
    right = [
        [b == t for b, t in zip(row.tolist(), text[1:], strict=False)] for row, text in zip(best, texts, strict=True)
    ]
    for n in range(1, 5):
        chains = [
            all(row[at : at + n])
            for row, answer in zip(right, [3, 4, 6], strict=True)
            for at in range(answer - 1, len(row) - n + 1)
        ]
        assert (sum(chains), len(chains)) == (survived[n - 1], counted[n - 1])


def test_heads_count_the_same_rows(tiny_target: Path, target: Transformer) -> None:
    weights, rng = load_weights(tiny_target), np.random.default_rng(0)
    batch = batch_of(target, [rng.integers(2, 16, n).tolist() for n in (14, 9, 20)], [3, 4, 6])
    head = EagleHead.from_target(target, weights, torch.arange(14))
    parallel = EagleHead.from_target(target, weights, torch.arange(14), Variant(mask_token=15, block=4)).eval()
    one, other = EagleObjective(head, target, 64, torch.float32), ParallelObjective(parallel, target, 64, torch.float32)
    (survived, counted), (parallels, of_parallel) = scored(one, batch), scored(other, batch)
    assert counted == of_parallel == [(10 - n) + (4 - n) + (13 - n) for n in range(4)]
    assert survived[0] == parallels[0]  # the first token is predicted from the same rows
    parallel.train()
    chosen = batch.drafting(0).nonzero()[:, 0]
    anchors, depths = other.mask_rows(batch, chosen.repeat(200), 4, torch.Generator().manual_seed(0))
    share = [int((depths == depth).sum()) / (200 * counted[depth]) for depth in (1, 2, 3)]
    assert share[0] == 1 and abs(share[1] - 0.8) < 0.02 and abs(share[2] - 0.64) < 0.02
    assert (batch.left[anchors] >= 2 + depths).all()


def test_widest_units_are_kept(tiny_target: Path) -> None:
    weights = load_weights(tiny_target)
    gate = weights["model.layers.3.mlp.gate_proj.weight"]
    gate[:8] *= 1e-3
    small = narrowed(weights, 40)
    assert torch.equal(small["model.layers.3.mlp.gate_proj.weight"], gate[8:])
    assert torch.equal(
        small["model.layers.3.mlp.down_proj.weight"], weights["model.layers.3.mlp.down_proj.weight"][:, 8:]
    )
    with pytest.raises(ValueError, match="--intermediate is 48; expected fewer than the 48 units"):
        narrowed(weights, 48)
