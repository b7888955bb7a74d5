"""Training of a drafter on recorded conversations, and its report on held-out ones."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spec_envs.experiments.drafters.batches import Batch
from spec_envs.experiments.drafters.distillation import Distillation
from spec_envs.experiments.drafters.eagle_objective import Objective
from spec_envs.experiments.drafters.recording import Example, load_shard, shard_lengths
from spec_envs.sealed import write_torch

CHECKPOINT_EVERY = 200  # batches


@dataclass(frozen=True)
class Report:
    """The number of held-out positions, and the share of them at which a chain of 1, 2, … tokens would be accepted."""

    positions: int
    chain_acceptance: list[float]


def batches(paths: list[Path], tokens: int, rng: random.Random) -> Iterator[list[Example]]:
    """Yield batches of examples of similar length with about ``tokens`` tokens each. The files and the batches of each
    file are shuffled."""
    for path in rng.sample(paths, len(paths)):
        examples = load_shard(path)  # the shortest first
        groups = grouped([len(example.ids) for example in examples], tokens)
        rng.shuffle(groups)
        for group in groups:
            yield [examples[i] for i in group]


def grouped(lengths: list[int], tokens: int) -> list[list[int]]:
    """Return the indices of ascending ``lengths`` in groups that hold about ``tokens`` tokens each, padding
    included."""
    groups: list[list[int]] = [[]]
    for i, length in enumerate(lengths):
        if groups[-1] and (len(groups[-1]) + 1) * length > tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def learning_rate(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Return the learning rate of a step: a linear warm-up, then a cosine that falls to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    objective: Objective | Distillation,
    paths: list[Path],
    checkpoint: Path,
    epochs: float,
    steps: int,
    batch_tokens: int,
    peak: float,
    share: float,
    seed: int,
) -> None:
    """Train a drafter in place. An interrupted run continues from ``checkpoint`` with the next batch of its epoch.

    Args:
        paths: files of recordings.
        epochs: passes over the recordings.
        steps, share: see the objective.
        batch_tokens: tokens of a batch.
        peak: highest learning rate.
        seed: seed of the order of batches and of the objective.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    model, device = objective.trained, objective.output_head.device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    per_epoch = sum(len(grouped(shard_lengths(path), batch_tokens)) for path in paths)
    done = 0
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, weights_only=True, map_location=device)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"cannot continue from {checkpoint}: {str(error).splitlines()[0]}; delete it") from None
        done = state["done"]
    total = round(epochs * per_epoch)
    # Matrix products of this size do not split well over cores, so each core computes a part of the batch instead.
    workers = torch.get_num_threads() if device.type == "cpu" else 1

    def gradient(examples: list[Example], part_seed: str) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(random.Random(part_seed).getrandbits(63))
        loss, survived, rows = objective(Batch.of(examples, device), steps, share, generator)
        return torch.autograd.grad(loss, trained), loss.detach(), survived, rows

    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with pool, tqdm(total=total, initial=done, unit="batch", desc="training the drafter") as bar:
        for epoch in range(done // per_epoch, math.ceil(epochs)):
            for i, examples in enumerate(batches(paths, batch_tokens, random.Random(f"{seed}-{epoch}"))):
                if not done <= epoch * per_epoch + i < total:
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(done, total, peak)
                seeds = [f"{seed}-{done}-{worker}" for worker in range(workers)]
                parts = [examples[worker::workers] for worker in range(min(workers, len(examples)))]
                found = list(pool.map(gradient, parts, seeds))
                tokens = [sum(len(example.ids) for example in part) for part in parts]
                for parameter, *grads in zip(trained, *(grads for grads, *_ in found), strict=True):
                    parameter.grad = sum(n / sum(tokens) * grad for n, grad in zip(tokens, grads, strict=True))
                nn.utils.clip_grad_norm_(trained, 0.5)
                optimizer.step()
                done += 1
                bar.update()
                if done % 10 == 0:
                    loss, survived, rows = (sum(parts) for parts in zip(*(rest for _, *rest in found), strict=True))
                    chain = (survived / rows.clamp(min=1)).tolist()
                    bar.set_postfix(
                        loss=f"{float(loss) / len(found):.3f}", accepted=" ".join(f"{a:.2f}" for a in chain)
                    )
                if done % CHECKPOINT_EVERY == 0 or done == total:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
                    write_torch(checkpoint, state)


@torch.no_grad()
def report(objective: Objective | Distillation, paths: list[Path], depth: int) -> Report:
    """Return the acceptance of chains of 1 to ``depth`` tokens on held-out text.

    It is a lower bound of the acceptance in use, because here the tokens of the rest of the text compete as well.
    """
    survived, rows = torch.zeros(depth), torch.zeros(depth)
    texts = sum(len(shard_lengths(path)) for path in paths)
    one = batches(paths, 1, random.Random(0))  # one text at a time, because each has its own vocabulary
    for examples in tqdm(one, total=texts, unit="text", desc="held-out text"):
        _, s, r = objective(Batch.of(examples, objective.output_head.device), depth)
        survived += s.cpu()
        rows += r.cpu()
    return Report(int(rows[0]), [round(a, 4) for a in (survived / rows.clamp(min=1)).tolist()])
