"""Thousands of episodes of a trace at once, in NumPy without a loop over environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from spec_envs.controls import CONTROLS, make_control
from spec_envs.controls.base import CONTEXT_UNIT
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.controls.opening import clocks_for
from spec_envs.controls.tree import TreeControl
from spec_envs.decoding.clock import PARTS, CostTable, PricedClock
from spec_envs.decoding.pair import DEFAULT_TARGET, static_over_plain
from spec_envs.decoding.trace import Trace
from spec_envs.env import EPISODES, RATES, check_keywords, choice
from spec_envs.vector.chains import Chains
from spec_envs.vector.recent import Recent
from spec_envs.vector.trees import Trees

WINDOWS = (4, 16)  # cycles over which the accepted tokens of trees are observed


class ReplayVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` environments of one control, replayed from a trace: the observations, rewards, terminations and infos
    of as many ``SpecEnv`` with the same ``trace=``.

    Args:
        control: ``"depth"``, ``"budget"``, ``"tree"`` or ``"k"``.
        num_envs: how many.
        trace: folder of a trace (`make trace`).
        keywords: the other keyword arguments of ``SpecEnv`` and of the control, as far as they mean something here.

    An environment whose text has ended begins another in the same step: ``infos["final_obs"]`` and
    ``infos["final_info"]`` (``tokens``, ``speedup``, ``task``) are what it ended with, at the places where
    ``infos["_final_obs"]`` is true. ``reset(options={"texts": indices})`` begins those texts of the trace. ``played`` counts
    the cycles so far, each one forward of the target if it were live.

    Raises:
        TypeError: an unknown keyword; the nearest one is named.
        ValueError: no trace, one of other settings, or a keyword that has no meaning here.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012 - Gymnasium's declaration

    def __init__(
        self,
        control: str,
        num_envs: int = 1,
        *,
        trace: str | None = None,
        split: str = "train",
        prompts: str = "all",
        clock: str | Sequence[str] = "wall",
        max_new_tokens: int | None = None,
        episode: str = "prompt",
        reward: str = "saved",
        pace: float | None = None,
        policy_seconds: float = 0.0,
        **keywords: Any,
    ):
        if trace is None:
            raise ValueError(
                "vectorised in NumPy are environments that replay a trace: give trace=FOLDER (`make trace`), or make "
                'live ones with vectorization_mode="sync"'
            )
        kind, max_new_tokens = CONTROLS[control], Trace.longest(max_new_tokens, trace)
        given = {"reward": reward, "episode": episode, "clock": clock, "max_new_tokens": max_new_tokens, "pace": pace}
        check_keywords(kind, {"trace": trace, "split": split, "prompts": prompts, **given, **keywords})
        choice("episode", episode, EPISODES)
        choice("reward", reward, kind.rewards)
        if reward in RATES and episode == "prompt":
            raise ValueError(f'reward="{reward}" needs episode="cycle"')
        self.trace, self.control = Trace.load(trace), make_control(control, keywords)
        self._check(keywords, max_new_tokens)
        self.clocks = [priced for priced in clocks_for(clock, "cpu", trace) if isinstance(priced, PricedClock)]
        self.num_envs, self.episode, self.reward_name, self.played = num_envs, episode, reward, 0
        self.max_new_tokens, self.policy_seconds, self.given_pace = max_new_tokens, policy_seconds, pace
        self.texts = np.array(self.trace.of_split(split, prompts))
        self.single_observation_space, self.single_action_space = (
            self.control.observation_space,
            self.control.action_space,
        )
        self.choices = int(self.control.action_space.n)  # type: ignore[attr-defined]
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.starts = self.trace.starts[:-1]
        self.lasts = np.minimum(self.trace.starts[1:], self.starts + max_new_tokens) - 1
        self.prompt_lengths = np.array([len(text.prompt) for text in self.trace.texts])
        self.tasks = np.array([text.task for text in self.trace.texts])
        self.text, self.last, self.begun = (np.zeros(num_envs, np.int64) for _ in range(3))
        self.pending, self.spent, self.cycle_spent = (np.zeros(num_envs) for _ in range(3))
        self.recent = Recent(WINDOWS, num_envs, 1)  # accepted tokens
        self.price([priced.table for priced in self.clocks])

    def price(self, tables: Sequence[CostTable]) -> None:
        """Price forwards by these tables from the next text on; of several, one is drawn per text."""
        kind = Chains if isinstance(self.control, KControl) else Trees
        self.cost_tables = list(tables)
        self.play = kind(self.trace, self.control, tables, self.num_envs, self.np_random)  # type: ignore[arg-type]
        manifest = self.trace.manifest
        self.plain = np.array([1 / table.seconds("verify", 1) for table in tables])
        best = static_over_plain(manifest.target, manifest.drafter)
        self.pace = self.plain * best if self.given_pace is None else np.full(len(tables), self.given_pace)

    def _check(self, keywords: dict[str, Any], max_new_tokens: int) -> None:
        """Refuse what a trace does not have, and what nobody would notice to be without effect."""
        control = self.control
        if not isinstance(control, (DepthControl, BudgetControl, TreeControl, KControl)) or control.engine != "torch":
            raise ValueError(f"{control.name} is not replayed in NumPy; make it with vectorization_mode='sync'")
        if isinstance(control, KControl) and control.adjustment_interval:
            raise ValueError("adjustment_interval is not replayed in NumPy; make it with vectorization_mode='sync'")
        if self.trace.kind != ("chain" if isinstance(control, KControl) else "tree"):
            raise ValueError(f"the trace {self.trace.folder} is one of {self.trace.kind}s; {control.name} wants others")
        if unused := [name for name in ("render_mode", "switch_every", "data_dir") if keywords.get(name)]:
            raise ValueError(f"{', '.join(unused)} means nothing for environments of a trace in NumPy; leave it out")
        recorded = {"width": control.width, "max_depth": control.max_depth}
        target = keywords.get("target", DEFAULT_TARGET)
        self.trace.check(
            {**keywords, **recorded, "target": "auto" if target == DEFAULT_TARGET else target}, max_new_tokens
        )

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a text in every environment.

        Args:
            options: ``{"texts": indices}`` of the trace, one per environment, instead of drawing them.

        Raises:
            ValueError: another option, or texts that there are not.
        """
        if isinstance(seed, list):
            seed = seed[0]
        super().reset(seed=seed)
        if seed is not None:
            self.play.seed(self.np_random)
        texts = (options or {}).get("texts")
        if set(options or {}) - {"texts"}:
            raise ValueError(f"options is {options!r}; expected {{'texts': indices of the trace}}")
        everywhere = np.arange(self.num_envs)
        if texts is not None:
            texts = np.asarray(texts)
            if texts.shape != everywhere.shape or not (texts >= 0).all() or not (texts < len(self.trace.texts)).all():
                raise ValueError(f"texts is {texts.tolist()}; expected {self.num_envs} indices of the trace's texts")
        self._begin(everywhere, texts)
        return self._observe(slice(None)), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Carry out a decision in every environment."""
        actions = np.asarray(actions, np.int64)
        if actions.shape != (self.num_envs,) or actions.min() < 0 or actions.max() >= self.choices:
            raise ValueError(f"actions are not {self.num_envs} of {self.single_action_space}")
        play = self.play
        done = play.act(actions)
        draft = self.pending + done.draft
        seconds = draft + done.verify + self.policy_seconds
        left = self.last - play.row
        emitted = np.where(done.verified, np.minimum(done.accepted + 1, left), 0)
        accepted = np.where(done.verified, np.minimum(done.accepted, left), 0)
        play.row += emitted
        self.played += int(done.verified.sum())
        finished = done.verified & (play.row == self.last)
        self.spent += seconds
        self.cycle_spent += seconds
        worth = self.plain[play.clock]
        if self.reward_name == "saved":
            rewards = emitted - self.pace[play.clock] * seconds
        else:
            rewards = emitted / (100 * self.cycle_spent)
        infos: dict[str, Any] = {
            "emitted": emitted,
            "accepted": accepted,
            "drafted": np.where(done.verified, done.drafted, 0),
            "verified": np.where(done.verified, done.sent, 0),
            "seconds": {
                **{part: np.zeros(self.num_envs) for part in PARTS if part != "prefill"},
                "draft": draft,
                "verify": done.verify,
                "policy": np.full(self.num_envs, self.policy_seconds),
            },
            "saved": emitted - worth * seconds,
        }
        self._end_cycles(np.flatnonzero(done.verified), accepted, emitted, done, finished)
        terminated = done.verified.copy() if self.episode == "cycle" else finished
        observations = self._observe(slice(None), ~finished)
        ended = np.flatnonzero(finished)
        if terminated.any():
            infos["final_obs"], infos["_final_obs"] = observations.copy(), terminated
        if len(ended):
            tokens = self.last - self.begun + 1
            speedup = (tokens - 1) / np.maximum(self.spent, 1e-12) / worth
            infos["final_info"] = {"tokens": tokens, "speedup": speedup, "task": self.tasks[self.text]}
            infos["_final_info"] = finished
            self._begin(ended)
            observations[ended] = self._observe(ended)
        return observations, rewards, terminated, np.zeros(self.num_envs, bool), infos

    def _end_cycles(
        self, which: np.ndarray, accepted: np.ndarray, emitted: np.ndarray, done: Any, finished: np.ndarray
    ) -> None:
        """What is remembered of cycles that ended, and what is drafted for the next ones."""
        if "recent" in self.control.slices:
            self.recent.push(which, accepted[which, None])
        self.cycle_spent[which] = 0.0
        self.pending[:] = 0.0
        self.pending[which] = self.play.verified(which, accepted, emitted, done)
        self.pending[finished] = 0.0

    def _begin(self, which: np.ndarray, texts: np.ndarray | None = None) -> None:
        """Texts begin in some environments: those, or any."""
        texts = self.np_random.choice(self.texts, len(which)) if texts is None else texts
        self.text[which], self.last[which], self.begun[which] = texts, self.lasts[texts], self.starts[texts]
        self.play.row[which] = self.starts[texts]
        if len(self.cost_tables) > 1:
            self.play.clock[which] = self.np_random.integers(len(self.cost_tables), size=len(which))
        self.recent.clear(which)
        self.spent[which] = self.cycle_spent[which] = 0.0
        self.pending[which] = self.play.start(which)

    def _observe(self, which: np.ndarray | slice, alive: np.ndarray | None = None) -> np.ndarray:
        """What the agents of some environments see."""
        row, text, slices = self.play.row[which], self.text[which], self.control.slices
        out = np.zeros((len(row), self.single_observation_space.shape[0]), np.float32)  # type: ignore[index]
        self.play.observe(out, which, np.ones(len(row), bool) if alive is None else alive)
        emitted = row - self.begun[which] + 1
        if "recent" in slices:
            at, cycles = slices["recent"].start, self.recent.cycles[which]
            for i, window in enumerate(WINDOWS):
                mean = self.recent.sums[i, which, 0] / np.clip(cycles, 1, window)
                out[:, at + i] = np.minimum(1.0, mean / (self.control.max_depth + 1))  # type: ignore[attr-defined]
        if "position" in slices:
            out[:, slices["position"].start] = emitted / self.max_new_tokens
            out[:, slices["context"].start] = np.minimum(1.0, (self.prompt_lengths[text] + emitted) / CONTEXT_UNIT)
        if "length" in slices:
            out[:, slices["length"]] = ((self.prompt_lengths[text] + emitted) / 1000)[:, None]
        return out
