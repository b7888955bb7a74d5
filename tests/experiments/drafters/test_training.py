"""Training improves a drafter, stops by validation, and continues exactly where it was interrupted."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import load_target
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.experiments.drafters import training as module
from spec_envs.experiments.drafters.batches import grouped, parted
from spec_envs.experiments.drafters.distillation import Distillation, Student
from spec_envs.experiments.drafters.distilled import Objective
from spec_envs.experiments.drafters.eagle_objective import EagleObjective
from spec_envs.experiments.drafters.evaluation import Acceptance, mean_accepted
from spec_envs.experiments.drafters.recording import States, Text, load_shard, record
from spec_envs.experiments.drafters.training import Course, Training
from tests.support.models.tiny import CPU
from tests.support.texts import plain_text

COURSE = Course(epochs=9, steps=3, batch_tokens=128, peak=5e-3, share=1.0, prompts=0.5, every=42, patience=100, seed=0)


@pytest.fixture
def target(tiny_target: Path) -> Transformer:
    return load_target(str(tiny_target), CPU, "float32")


@pytest.fixture(scope="module")
def recorded(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a file of 40 recorded texts of two kinds."""
    target, folder = load_target(str(tiny_target), CPU, "float32"), tmp_path_factory.mktemp("recorded")
    rng, texts = random.Random(0), []
    decoder = load_decoder(str(tiny_target), None, "cpu", "float32")
    for i in range(40):
        decoder.eos = frozenset()
        prompt = [rng.randrange(2, 16) for _ in range(6)]
        texts.append(Text(prompt + plain_text(decoder, prompt, 30), 6, "ab"[i % 2]))
    paths = record(target, texts, folder, (2, 4, 5))
    before = paths[0].stat().st_mtime_ns
    assert record(target, texts, folder, (2, 4, 5)) == paths
    assert paths[0].stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"00000.safetensors holds other texts; delete"):
        record(target, texts[1:], folder, (2, 4, 5))
    return paths


def student(target: Transformer, folder: Path) -> Distillation:
    """Return the objective of a draft model that is not trained yet."""
    model = Student.from_target(load_config(folder), load_weights(folder), target, 3, torch.arange(16))
    return Distillation(model, target, torch.float32)


def improved(trained: Objective, recorded: list[Path], folder: Path) -> list[float]:
    """Train a drafter, check that it improves, and return its acceptance at every validation."""
    progress = Training(trained, recorded, load_shard(recorded[0])[:12], folder, COURSE).run()
    accepted = [line["accepted"] for line in progress.curve]
    assert accepted[-1] > accepted[0] + 0.1 and round(progress.best, 4) == max(accepted)
    assert progress.done == 9 * len(grouped([36] * 40, 128)) and progress.tokens == 9 * 40 * 36
    return accepted


def test_training_improves_a_head(tiny_target: Path, target: Transformer, recorded: list[Path], tmp_path: Path) -> None:
    head = EagleHead.from_target(target, load_weights(tiny_target), torch.arange(16))
    improved(EagleObjective(head, target, 64, torch.float32), recorded, tmp_path)


def test_training_improves_and_resumes_exactly(
    tiny_target: Path, target: Transformer, recorded: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = load_shard(recorded[0])
    assert len(examples) == 40 and {example.kind for example in examples[:12]} == {"a", "b"}
    assert examples[0].features.values.dtype == torch.int8 and examples[0].final.restored(CPU).shape == (36, 32)
    sample = examples[:12]
    straight = student(target, tiny_target)
    accepted = improved(straight, recorded, tmp_path / "straight")
    steps, step = [], Training.step

    def killed(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 100:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "step", killed)
        Training(student(target, tiny_target), recorded, sample, tmp_path / "killed", COURSE).run()
    resumed = student(target, tiny_target)
    again = Training(resumed, recorded, sample, tmp_path / "killed", COURSE).run()
    for a, b in zip(straight.trained.parameters(), resumed.trained.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [line["accepted"] for line in again.curve] == accepted
    events = EventAccumulator(str(tmp_path / "killed" / "events")).Reload()
    assert [event.step for event in events.Scalars("validation/accepted")] == [line["batches"] for line in again.curve]
    (tmp_path / "killed" / "checkpoint.pt").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"cannot continue from .*checkpoint.pt.*; delete it"):
        Training(resumed, recorded, sample, tmp_path / "killed", COURSE)


def test_best_weights_are_kept_and_training_stops(
    tiny_target: Path, target: Transformer, recorded: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([0.2, 0.5, 0.4, 0.5])  # the second is the best
    weights, drafter = [], student(target, tiny_target)

    def evaluated(*_: Any) -> tuple[None, dict[str, Acceptance]]:
        weights.append([p.detach().clone() for p in drafter.trained.parameters()])
        return None, {"a": Acceptance(9, [next(figures)])}

    monkeypatch.setattr(module, "evaluated", evaluated)
    course = dataclasses.replace(COURSE, patience=2, every=5)
    progress = Training(drafter, recorded, [], tmp_path / "run", course).run()
    assert progress.done == 4 * course.every and progress.best == 0.5
    assert all(torch.equal(a, b) for a, b in zip(weights[1], drafter.trained.parameters(), strict=True))
    again = Training(drafter, recorded, [], tmp_path / "run", course)
    assert again.run().done == 4 * course.every  # it has ended
    assert all(torch.equal(a, b) for a, b in zip(weights[1], drafter.trained.parameters(), strict=True))


def test_states_are_rounded_by_groups() -> None:
    torch.manual_seed(0)
    states = torch.randn(9, 128)
    states[:, 3] *= 1e4  # as one of a target's states is
    rounded = States.of(states).restored(CPU)
    scale = states.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    assert ((rounded - states).unflatten(-1, (-1, 32)).abs() <= scale * (0.5 + 127 / 256)).all()
    assert (rounded - states)[:, 32:].norm() < 0.01 * states[:, 32:].norm()
    assert torch.equal(States.of(torch.zeros(2, 48)).restored(CPU), torch.zeros(2, 48))


def test_texts_are_grouped_and_parted() -> None:
    assert grouped([3, 3, 4, 9, 2, 2], 10) == [[0, 1, 2], [3], [4, 5]]
    assert parted([3, 9, 4, 2], 2) == [[1], [2, 0, 3]]
    assert parted([3], 2) == [[0]]


def test_every_kind_counts_the_same() -> None:
    kinds = {"a": Acceptance(1000, [0.5, 0.25]), "b": Acceptance(1, [1.0, 1.0, 1.0, 1.0, 1.0])}
    assert mean_accepted(kinds) == (0.75 + 4) / 2
