"""Agents that improve an early exit while it decodes, from a stream of prompts."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import gymnasium as gym
import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from spec_envs.agents.exits.base import ExitAgent
from spec_envs.agents.exits.passes import ExitPass
from spec_envs.agents.exits.replay import Replay, Segment, merged, packed, unpacked, verified_rows
from spec_envs.agents.journal import Journal
from spec_envs.agents.run import CHECKPOINT, Run
from spec_envs.agents.schedules import ScheduleName, schedule
from spec_envs.agents.settings import Count, Natural, SeededSettings
from spec_envs.controls.base import Control
from spec_envs.controls.dvi import on_exit
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.exits.decoder import ExitDecoder
from spec_envs.env import EndedText, SpecEnv
from spec_envs.prompts.sets import Prompt, in_turn
from spec_envs.sealed import first_line, read_torch, write_torch

ROWS = 32  # of logits at a time
COUNTERS = ("steps", "updates", "texts_read", "tokens", "validated")  # of a checkpoint


class OnlineAgent(ExitAgent):
    """Improves the exit that it drafts by, between the blocks that it drafts.

    Args:
        control: of ``SpecDVI-v0``.
        hyperparameters: fields of ``Settings``, by name.

    Attributes:
        steps, updates, texts_read, tokens: environment steps, updates, texts and emitted tokens so far.

    Raises:
        ValueError: another problem, or a value out of its range.
    """

    class Settings(SeededSettings):
        fast_batch: Count = Field(64, description="verified rows between updates")
        replay_size: Count = Field(8192, description="rows that are remembered")
        replay_batch: Natural = Field(192, description="remembered rows that join those of an update")
        updates_per_batch: Count = Field(1, description="updates whenever there are `fast_batch` new rows")
        texts: Count | None = Field(
            None,
            description="texts after which learning ends, if the steps have not ended it; None reads every prompt of "
            "the stream once",
        )
        order: Literal["shuffled", "logged"] = Field(
            "shuffled",
            description='prompts "shuffled", or as they were "logged"; with the environment\'s `switch_every` the '
            "prompt sets take turns",
        )
        lr_schedule: ScheduleName = Field(
            "constant",
            description="schedule of the learning rates over the texts, or over the steps if these end first",
        )
        shortlist: Count = Field(
            4096, description="most frequent tokens that a drafter proposes later, besides those of its text"
        )

    settings: Settings
    learns_from = "cycles"
    charges_training = False  # a decision is the drafter's own work
    validated_by = "acceptance"
    starts_from = ("init",)

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        self.replay = Replay(self.settings.replay_size)
        self.steps = self.updates = self.texts_read = self.tokens = self.validated = 0
        self.pending: list[Segment] = []
        self.done = 0.0  # share of the learning
        self.rates = schedule("constant", 1.0, 1)
        self.since = dict.fromkeys(("accepted", "scored", "emitted", "cycles", "nats"), 0.0)
        self.journal = Journal(None, 0, 0, {}, "dvi", "accept_rate")
        self.decoder: ExitDecoder | None = None
        self.rows: list[Segment] = []  # of the current text, since the last update

    def bind(self, decoder: Engine) -> None:
        """Improve the exit of this decoder from now on, starting from the weights that were loaded before.

        ``generate(decoder, control, agent, prompt, learn=True)`` then learns while it serves.

        Raises:
            ValueError: it has another exit than this agent's problem.
        """
        own = on_exit(decoder)
        self._check(own.drafter.adapter, "the decoder")
        trained, self._adapter = self._adapter, own.drafter.adapter
        if self._adapter.version == 0:  # it was never trained
            self._adapter.initialise(self.settings.seed)
        if trained is not None and trained is not self._adapter:
            self._adapter.load_state_dict(trained.state_dict())
            self._adapter.touched()
        self.decoder, self.passes, self._deployed, self.block = own, ExitPass(self._adapter), None, []
        self.counts = torch.zeros(self._adapter.target.shape.vocab, dtype=torch.int64)
        self._adapter.requires_grad_(True)
        self.optimizer = self.optimizers()

    def record(self, observation: np.ndarray, action: int, reward: float, following: np.ndarray, done: bool) -> None:
        """Learn from the cycle that has just ended, of the decoder that this agent is bound to.

        Raises:
            ValueError: it is bound to none.
        """
        if self.decoder is None:
            raise ValueError(f"{type(self).__name__} is bound to no decoder; call bind(decoder) before it learns")
        if len(self.decoder.cycles) == 1 and self.rows:  # the text before was never ended
            self.pending.append(merged(self.rows))
            self.rows = []
        self.rows.append(self._rows(self.decoder))
        self.block = []
        enough = sum(map(len, self.rows)) + sum(map(len, self.pending)) >= self.settings.fast_batch
        if enough or done:
            self.pending.append(merged(self.rows))
            self.rows = []
        if enough:
            self._update()

    def learn(self, total_timesteps: int, env: gym.Env, run: Run | None = None) -> Self:
        """Decode and learn, text by text, until ``total_timesteps`` drafted tokens or ``texts``, continuing from the
        run's checkpoint. Checkpoints and validations are made at the end of a text.

        Raises:
            ValueError: an environment that does not decode, or a checkpoint that cannot be read.
        """
        run = run or Run()
        spec_env = env.unwrapped
        if not isinstance(spec_env, SpecEnv):
            raise ValueError(f"{type(self).__name__} learns while it decodes: it needs SpecDVI-v0, not {spec_env}")
        self.bind(spec_env.decoder)
        if run.folder is not None and run.begun:
            self.load_checkpoint((run.folder / CHECKPOINT).parent)
        shown = {"agent": type(self).__name__, "seed": self.settings.seed}
        self.journal = Journal(run.folder, self.updates, self.texts_read, shown, "dvi", "accept_rate")
        order = self._order(spec_env)
        last = self.settings.texts if self.settings.texts is not None else len(order)
        self.rates = schedule(self.settings.lr_schedule, 1.0, max(2, last))
        if run.eval_freq and self.texts_read == 0:
            self._validate(run)
        saved = self.steps
        with tqdm(
            total=last, initial=self.texts_read, unit="text", desc="learning", disable=not run.progress_bar
        ) as bar:
            while self.steps < total_timesteps and self.texts_read < last:
                self.done = max(self.texts_read / last, self.steps / total_timesteps)
                self._text(env, order[self.texts_read % len(order)])
                bar.update()
                ended = self.steps >= total_timesteps or self.texts_read >= last
                if run.eval_freq and (ended or self.steps - self.validated >= run.eval_freq):
                    self._validate(run)
                    self.validated = self.steps
                if run.folder is not None and (ended or self.steps - saved >= run.checkpoint_freq):
                    self.save_checkpoint((run.folder / CHECKPOINT).parent)
                    saved = self.steps
        self.journal.close()
        self._finish()
        return self

    def _validate(self, run: Run) -> None:
        """Write down the figures of a validation of the current exit."""
        if run.validate is not None:
            read = {"step": self.updates, "texts": self.texts_read, "tokens": self.tokens}
            self.journal.write("validation", read | run.validate(self))

    def _order(self, env: SpecEnv) -> list[Prompt]:
        """Return the prompts of one pass over the stream, in the agent's order."""
        prompts = list(env.prompts)
        if self.settings.order == "shuffled":
            np.random.default_rng(self.settings.seed).shuffle(prompts)
        return in_turn(prompts, env.settings.switch_every) if env.settings.switch_every else prompts

    def _text(self, env: gym.Env, prompt: Prompt) -> None:
        """Decode one text and learn from it."""
        self.texts_read += 1
        try:
            observation, _ = env.reset(
                seed=self.settings.seed * 1_000_003 + self.texts_read, options={"prompt": prompt}
            )
        except EndedText:
            return
        done = False
        while not done:
            before, (token, _) = observation, self.predict(observation)
            observation, reward, done, _, info = env.step(token)
            self.steps += 1
            if info["emitted"]:
                self.record(before, token, float(reward), observation, done)

    def _rows(self, decoder: ExitDecoder) -> Segment:
        """Return the rows of the decoder's last cycle, one per emitted token."""
        verifier, cycle = decoder.verifier, decoder.cycles[-1]
        n, positions = cycle.emitted, self.control.details(decoder, cycle)["positions"]
        emitted = torch.tensor(cycle.tokens, device=verifier.device)
        nats = -verifier.logits[:n].float().log_softmax(-1).gather(1, emitted[:, None]).sum()
        self.counts += torch.bincount(emitted.cpu(), minlength=len(self.counts))
        self.tokens += n
        new = {"accepted": cycle.accepted, "scored": len(positions), "emitted": n, "cycles": 1, "nats": float(nats)}
        self.since = {name: value + new[name] for name, value in self.since.items()}
        text, behaviour = [*decoder.prompt, *decoder.tokens[:-1]], (self.block or [])[: len(positions)]
        return verified_rows(verifier, text, positions, behaviour, n)

    def _update(self) -> None:
        """Learn from the rows that wait and from remembered ones."""
        since = self.since
        line: dict[str, Any] = {"texts": self.texts_read, "tokens": self.tokens}
        for _ in range(self.settings.updates_per_batch):
            remembered = self.replay.sample(self.settings.replay_batch, self.rng)
            line["loss_rl"], line["loss_slow"] = self.fast_update([*remembered, *self.pending])
            self.updates += 1
        line["accept_rate"] = since["accepted"] / since["scored"] if since["scored"] else None
        line["emitted_per_cycle"] = since["emitted"] / since["cycles"]
        line["ppl_sample"] = self.perplexity()
        self.journal.write("log", {"step": self.updates, **line})
        self.replay.add(self.pending)
        self.pending = []
        self.since = dict.fromkeys(since, 0.0)

    def perplexity(self) -> float | None:
        """Return the target's perplexity on what was emitted since the last update; None where no next token is
        known."""
        if self.adapter.lossless:
            return float(np.exp(self.since["nats"] / self.since["emitted"]))
        segment, target = self.pending[-1], self.adapter.target
        places = segment.places[:-1]  # whose next tokens are known
        if not len(places):
            return None
        logits = target.head(self.passes.through(segment.ids, range(target.shape.layers))[places]).float()
        return float(torch.nn.functional.cross_entropy(logits, segment.ids[places + 1]).exp())

    def descend(self, name: str, segments: Sequence[Segment], loss: Callable[[slice, Tensor], Tensor]) -> float:
        """Take one step of an optimiser by the mean of a loss over the rows of segments, some rows at a time: their
        logits are then still in the processor's cache when they are read again.

        Args:
            loss: from a range of the rows and the exit's logits there, ``[n, vocab]``, to the loss of each, ``[n]``.
        """
        optimizer, states = self.optimizer[name], self.passes.rows(segments)
        leaf = states.detach().requires_grad_(states.requires_grad)
        optimizer.zero_grad()
        total = 0.0
        for first in range(0, len(leaf), ROWS):
            rows = slice(first, first + ROWS)
            part = loss(rows, self.adapter.logits(leaf[rows])).sum() / len(leaf)
            part.backward()
            total += part.item()
        if states.requires_grad:
            states.backward(leaf.grad)
        self._stepped(optimizer)
        return total

    def step(self, name: str, loss: Tensor) -> None:
        """Take one step of an optimiser; decoders use the new weights when their next text begins."""
        optimizer = self.optimizer[name]
        optimizer.zero_grad()
        loss.backward()
        self._stepped(optimizer)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * self.rates(1 - self.done)
        optimizer.step()
        self.adapter.touched()
        self._deployed = None

    def _finish(self) -> None:
        """End learning: from now on the agent drafts from a shortlist."""
        frequent = self.counts.argsort(descending=True, stable=True)[: self.settings.shortlist]
        frequent = frequent[self.counts[frequent] > 0]
        if len(frequent):
            self.adapter.shortlist = frequent.sort().values.numpy()
        self.adapter.touched()
        self.decoder, self._deployed, self.block = None, None, None
        self.decision_seconds = self.measure()

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimisers by name; ``step`` takes one."""

    @abstractmethod
    def fast_update(self, segments: Sequence[Segment]) -> tuple[float, float | None]:
        """Make an update on some rows, and return its two losses for the log."""

    def extra_state(self) -> dict[str, Any]:
        """Return the agent's state besides weights and optimisers, for its checkpoint."""
        return {}

    def take_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what ``extra_state`` returned."""

    def save_checkpoint(self, folder: Path) -> None:
        """Write everything that learning needs to continue, between two texts."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "adapter": self.adapter.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizer.items()},
            "replay": packed(self.replay.segments),
            "pending": packed(self.pending),
            "counts": self.counts,
            "since": self.since,
            "rng": json.dumps(self.rng.bit_generator.state),
            "extra": self.extra_state(),
            **{name: getattr(self, name) for name in COUNTERS},
        }
        write_torch(folder / CHECKPOINT.name, state)

    def load_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Continue from a checkpoint; nothing was saved beside it.

        Raises:
            ValueError: a damaged one, or one of another exit.
        """
        path, remedy = folder / CHECKPOINT.name, "delete it to start over"
        state = read_torch(path, "the checkpoint", remedy)
        device = self.adapter.target.device
        try:
            self.adapter.load_state_dict(state["adapter"])
            for name, optimizer in self.optimizer.items():
                optimizer.load_state_dict(state["optimizers"][name])
            self.replay.segments = unpacked(state["replay"], device)
            self.pending = unpacked(state["pending"], device)
            self.counts, self.since = state["counts"], state["since"]
            self.rng.bit_generator.state = json.loads(state["rng"])
            self.take_extra_state(state["extra"])
            for name in COUNTERS:
                setattr(self, name, state[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"cannot read the checkpoint {path}: {first_line(error)}; {remedy}") from None
        self.adapter.touched()
        return {}


def adamw(weights: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW without decay."""
    return torch.optim.AdamW(weights, learning_rate, weight_decay=0.0, fused=True)
