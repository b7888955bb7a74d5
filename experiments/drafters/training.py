"""Training of a drafter on recorded conversations. Conversations of other kinds decide which weights are kept, and when
to stop."""

from __future__ import annotations

import math
import pickle
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from spec_envs.experiments.drafters.batches import Batch, grouped, parted
from spec_envs.experiments.drafters.distilled import Objective, Scores
from spec_envs.experiments.drafters.evaluation import Acceptance, evaluated, mean_accepted
from spec_envs.experiments.drafters.recording import Example, load_shard, shard_lengths
from spec_envs.sealed import first_line, write_torch

WARMUP = 100  # batches
LOGGED = 10  # batches between two figures of the progress bar


@dataclass(frozen=True)
class Course:
    """How long and on what a drafter is trained.

    Attributes:
        epochs: most passes over the text.
        steps: length of the chains that are trained or shown.
        batch_tokens: most tokens of a batch.
        peak: highest learning rate.
        share, prompts: see ``Objective``.
        every: batches between two validations, each of which ends with a checkpoint.
        patience: validations without a better one after which training stops.
        seed: of the order of batches and of drawn rows.
    """

    epochs: float
    steps: int
    batch_tokens: int
    peak: float
    share: float
    prompts: float
    every: int
    patience: int
    seed: int


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        done: batches.
        tokens: of those batches, prompts included.
        seconds: of training, validations included.
        best: largest mean number of accepted tokens so far.
        stale: validations since then.
        weights: the drafter's at that time.
        curve: a line for each validation.
    """

    done: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = -1.0
    stale: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)


class Training:
    """Trains a drafter in place. An interrupted run continues from its last validation.

    Args:
        objective: with the drafter.
        paths: files of recordings.
        validation: conversations of other kinds, of which each kind counts the same.
        folder: of the checkpoint and of TensorBoard's events.
        course: what is trained.

    Raises:
        ValueError: the checkpoint is damaged.
    """

    def __init__(
        self, objective: Objective, paths: list[Path], validation: Sequence[Example], folder: Path, course: Course
    ):
        self.objective, self.paths, self.validation, self.course = objective, paths, validation, course
        self.checkpoint, self.events = folder / "checkpoint.pt", folder / "events"
        self.trained = [p for p in objective.trained.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=course.peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.per_epoch = sum(len(grouped(shard_lengths(path), course.batch_tokens)) for path in paths)
        self.total = max(1, round(course.epochs * self.per_epoch))
        # Matrix products of this size do not split well over cores, so each core computes a part of the batch instead.
        self.workers = torch.get_num_threads() if objective.device.type == "cpu" else 1
        self.progress = self.restored()

    def restored(self) -> Progress:
        """Return where the checkpoint stands, with its weights in the drafter."""
        if not self.checkpoint.exists():
            return Progress()
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location=self.objective.device)
            self.objective.trained.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            return Progress(**state["progress"])
        except (RuntimeError, TypeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"cannot continue from {self.checkpoint}: {first_line(error)}; delete it") from None

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"model": self.objective.trained.state_dict(), "optimizer": self.optimizer.state_dict()}
        write_torch(self.checkpoint, state | {"progress": vars(self.progress)})

    def run(self) -> Progress:
        """Train until the course ends or validation improves no more; the drafter then has its best weights."""
        progress, every = self.progress, self.course.every
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        bar = tqdm(total=self.total, initial=progress.done, unit="batch", desc="training the drafter")
        writer = SummaryWriter(str(self.events), purge_step=progress.done + 1)
        with pool, bar, writer:
            losses, begun = [], time.perf_counter() - progress.seconds
            for examples in self.batches() if progress.stale < self.course.patience else ():
                scores = self.step(examples, pool)
                losses.append(float(scores.loss))
                progress.done += 1
                progress.tokens += sum(len(example.ids) for example in examples)
                bar.update()
                if progress.done % LOGGED == 0:
                    chain = (scores.survived / scores.counted.clamp(min=1)).tolist()
                    bar.set_postfix(loss=f"{losses[-1]:.3f}", accepted=" ".join(f"{share:.2f}" for share in chain[:6]))
                if progress.done % every == 0 or progress.done == self.total:
                    kinds = evaluated(self.objective, self.validation, self.course.steps, pool)[1]
                    progress.seconds = time.perf_counter() - begun
                    self.note(kinds, sum(losses) / len(losses), writer)
                    self.save()
                    losses = []
                    if progress.stale == self.course.patience:
                        break
        self.objective.trained.load_state_dict(progress.weights)
        return progress

    def batches(self) -> Iterator[list[Example]]:
        """Yield the batches that are not done yet. The files and the batches of each file are shuffled in every epoch."""
        done, first = self.progress.done, self.progress.done // self.per_epoch * self.per_epoch
        for epoch in range(done // self.per_epoch, math.ceil(self.course.epochs)):
            rng = random.Random(f"{self.course.seed}-{epoch}")
            for path in rng.sample(self.paths, len(self.paths)):
                groups = grouped(shard_lengths(path), self.course.batch_tokens)
                rng.shuffle(groups)
                open_groups = groups[max(0, done - first) : max(0, self.total - first)]
                first += len(groups)
                if open_groups:
                    examples = load_shard(path)
                    yield from ([examples[i] for i in group] for group in open_groups)

    def step(self, examples: list[Example], pool: ThreadPoolExecutor) -> Scores:
        """Train on a batch and return its scores."""
        course, done = self.course, self.progress.done
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(done, self.total, course.peak)

        def gradient(number: int, part: list[int]) -> tuple[Scores, tuple[Tensor, ...]]:
            seed = random.Random(f"{course.seed}-{done}-{number}").getrandbits(63)
            generator = torch.Generator(self.objective.device).manual_seed(seed)
            batch = Batch.of([examples[i] for i in part], self.objective.device, self.objective.reads_features)
            scores = self.objective(batch, course.steps, course.share, generator, course.prompts)
            return scores, torch.autograd.grad(scores.loss, self.trained)

        parts = parted([len(example.ids) for example in examples], self.workers)
        found = list(pool.map(gradient, range(len(parts)), parts))
        rows = [float(scores.counted[0]) for scores, _ in found]
        weights = [n / max(1.0, sum(rows)) for n in rows]
        for parameter, *grads in zip(self.trained, *(grads for _, grads in found), strict=True):
            parameter.grad = sum(weight * grad for weight, grad in zip(weights, grads, strict=True))
        nn.utils.clip_grad_norm_(self.trained, 0.5)
        self.optimizer.step()
        losses = torch.stack(
            [weight * scores.loss.detach() for weight, (scores, _) in zip(weights, found, strict=True)]
        )
        survived, counted = (
            torch.stack([getattr(s, name) for s, _ in found]).sum(0) for name in ("survived", "counted")
        )
        return Scores(losses.sum(), survived, counted)

    def note(self, kinds: dict[str, Acceptance], loss: float, writer: SummaryWriter) -> None:
        """Note a validation, and keep the weights if they are the best so far."""
        progress, accepted = self.progress, mean_accepted(kinds)
        line: dict[str, Any] = {"batches": progress.done, "tokens": progress.tokens}
        line |= {"minutes": round(progress.seconds / 60, 2), "loss": round(loss, 4), "accepted": round(accepted, 4)}
        progress.curve.append(line)
        writer.add_scalar("train/loss", loss, progress.done)
        writer.add_scalar("train/learning_rate", self.optimizer.param_groups[0]["lr"], progress.done)
        writer.add_scalar("validation/accepted", accepted, progress.done)
        for kind, acceptance in kinds.items():
            writer.add_scalar(f"validation/accepted/{kind}", acceptance.accepted, progress.done)
        writer.flush()
        progress.stale += 1
        if accepted > progress.best:
            progress.best, progress.stale = accepted, 0
            progress.weights = {name: value.clone() for name, value in self.objective.trained.state_dict().items()}


def learning_rate(step: int, total: int, peak: float) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine that falls to a twentieth of the peak."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, total - WARMUP)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
