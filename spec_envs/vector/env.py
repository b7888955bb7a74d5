"""Replay thousands of episodes of a trace at once, in NumPy and without a loop over environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from spec_envs.checked import choice
from spec_envs.controls import CONTROLS, make_control
from spec_envs.controls.observation.entries import CONTEXT_UNIT, LENGTH_UNIT, WINDOWS
from spec_envs.controls.rewards import Decision
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.env import EndedText
from spec_envs.recordings import clocks_for, exact, is_exact
from spec_envs.settings import Settings
from spec_envs.vector.arms import ArmTable
from spec_envs.vector.chains import Chains
from spec_envs.vector.cycles import CycleTable
from spec_envs.vector.drafters import Drafters
from spec_envs.vector.draws import Draws
from spec_envs.vector.infos import blank, cleared, gathered
from spec_envs.vector.recent import Recent
from spec_envs.vector.trees import Trees

KINDS: dict[str, tuple[Any, Any]] = {  # tables of cycles, and what is under way, by the kind of a trace
    "tree": (CycleTable, Trees),
    "chain": (CycleTable, Chains),
    "portfolio": (ArmTable, Drafters),
}
UNUSED = ("render_mode", "switch_every", "adjustment_interval")  # keywords that are not supported here


class ReplayVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` environments of one control, replayed from a trace: the observations, rewards, terminations and
    infos of a ``SyncVectorEnv`` of as many ``SpecEnv`` with the same ``trace=``, each with a generator of its own.

    Args:
        control: name of a control that traces replay, or ``"module:Class"``.
        num_envs: number of environments.
        autoreset_mode: Gymnasium's ``AutoresetMode``, or its name ``"SameStep"``, ``"NextStep"`` or ``"Disabled"``.
            With ``"SameStep"`` an environment whose episode has ended begins another one in the same step; the last
            observation and info of the old one are in ``infos["final_obs"]`` and ``infos["final_info"]`` where
            ``infos["_final_obs"]`` is true.
        keywords: those of ``SpecEnv`` that have an effect here; ``trace`` is the folder of a trace (`spec-envs trace`).

    ``reset`` takes one seed (environment i then has ``seed + i``) or a list with one for each environment. Its options
    are ``{"texts": indices}``, which begins those texts of the trace, and Gymnasium's ``"reset_mask"``. A copy
    continues where the original was.

    Attributes:
        forwards: number of forwards that the target would have made so far, one per cycle.
        brought: the numbers of the last step by their names in an info, also for episodes that it ended.
        cycles: table of every cycle of the trace.
        under_way: the trees or chains under way.

    Raises:
        TypeError: an unknown keyword; the nearest one is named.
        ValueError: no trace, a trace of other settings, or a keyword that is not supported here.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}  # noqa: RUF012 - Gymnasium's declaration

    def __init__(
        self,
        control: str,
        num_envs: int = 1,
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        **keywords: Any,
    ):
        kind = CONTROLS[control]
        self.settings = settings = Settings.read(kind, keywords)
        check_count(num_envs)
        if settings.trace is None or not is_exact(settings.trace):
            raise ValueError(
                f"trace is {settings.trace!r}; environments in NumPy replay a recorded trace: give trace=FOLDER "
                '(`spec-envs trace`), or make live ones, and those of a profile, with vectorization_mode="sync"'
            )
        self.trace = exact(settings.trace)
        self.trace.check_settings(dict(settings))
        self.max_new_tokens = self.trace.max_new_tokens if settings.max_new_tokens is None else settings.max_new_tokens
        self.control = make_control(control, keywords | dict(settings))
        self._check(keywords)
        self.metadata = self.metadata | {"autoreset_mode": autoreset(autoreset_mode)}
        self.autoreset_mode = self.metadata["autoreset_mode"]
        clocks = clocks_for(settings.clock, "cpu", self.trace)
        self.clocks = [priced for priced in clocks if isinstance(priced, PricedClock)]
        self.num_envs, self.reward_name, self.forwards = num_envs, settings.reward or next(iter(kind.rewards)), 0
        self.policy_seconds, self.given_pace = settings.policy_seconds, settings.pace
        self.texts = np.array(self.trace.of_split(settings.split, settings.prompts))
        self.single_observation_space, self.single_action_space = (
            self.control.observation_space,
            self.control.action_space,
        )
        self.choices = int(self.control.action_space.n)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.starts = self.trace.starts[:-1]
        self.lasts = np.minimum(self.trace.starts[1:], self.starts + self.max_new_tokens) - 1
        self.prompt_lengths = np.array([len(text.prompt) for text in self.trace.texts])
        self.tasks = np.array([text.task for text in self.trace.texts], object)
        self.words = np.full(len(self.tasks), None, object)  # decoded texts, each once it is needed
        self.text, self.last, self.begun = (np.zeros(num_envs, np.int64) for _ in range(3))
        self.pending, self.spent, self.cycle_spent = (np.zeros(num_envs) for _ in range(3))
        self.recent = Recent(WINDOWS, num_envs, 1)  # accepted tokens
        self.draws, self.brought = Draws(num_envs), self._blank()
        self.cycles = KINDS[self.control.trace_kind][0](self.trace, self.control)
        self.price([priced.table for priced in self.clocks])

    def price(self, tables: Sequence[CostTable]) -> None:
        """Price forwards by these tables from the next reset on; if there are several, one is drawn per text."""
        self.cost_tables = list(tables)
        self.under_way = KINDS[self.control.trace_kind][1](self.cycles, tables, self.num_envs, self.draws)
        self.plain = np.array([1 / table.seconds("verify", 1) for table in tables])
        self.pace = (
            self.plain * self.trace.static_over_plain
            if self.given_pace is None
            else np.full(len(tables), self.given_pace)
        )
        self.has_text = np.zeros(self.num_envs, bool)
        self.ended = np.zeros(self.num_envs, bool)  # environments whose episode the last step ended

    def _check(self, keywords: dict[str, Any]) -> None:
        """Refuse settings that the trace does not have, and keywords that would have no effect."""
        control = self.control
        if not control.trace_kind or control.engine != "torch":
            raise ValueError(f"{control.env_id} is not replayed in NumPy; make it with vectorization_mode='sync'")
        if unused := [name for name in UNUSED if keywords.get(name)]:
            raise ValueError(
                f"{', '.join(unused)} has no effect in environments in NumPy; leave it out, or make them with "
                "vectorization_mode='sync'"
            )
        self.trace.check(control, self.max_new_tokens)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a text in every environment, or with ``episode="cycle"`` its next cycle.

        Args:
            seed: environment i has ``seed + i``, or the i-th of a list; None keeps the generators as they are.
            options: ``{"texts": indices}``, texts of the trace to begin, one per environment, instead of drawn ones;
                and ``"reset_mask"``, an array of booleans, to reset only some environments.

        Raises:
            ValueError: an unknown option, indices outside the trace, or the wrong number of seeds. No environment has a
                text then.
        """
        self._check_open()
        begun, self.has_text = self.has_text, np.zeros(self.num_envs, bool)
        mask, texts = self._options(options)
        seeds = self._seeds(seed)
        which = np.flatnonzero(mask)
        self.draws.seed(seeds, which)
        again = np.array([own is not None for own in seeds]) | ~begun | (self.under_way.row == self.last)
        new = which if self.settings.episode == "prompt" or texts is not None else which[again[which]]
        self._begin(new, None if texts is None else texts[new])
        self.has_text, self.ended = begun | mask, self.ended & ~mask
        return self._observe(slice(None)), gathered(self._blank(), mask)

    def _options(self, options: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a mask of the environments to reset, and the texts to begin in all of them, or None to draw them."""
        expected = "expected {'texts': indices of the trace, 'reset_mask': booleans}, or one of the two"
        if options is not None and (not isinstance(options, dict) or set(options) - {"texts", "reset_mask"}):
            raise ValueError(f"options is {options!r}; {expected}")
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise ValueError(f"reset_mask is {mask!r}; expected {self.num_envs} booleans, one of them true")
        if options is None or "texts" not in options:
            return mask, None
        texts = np.asarray(options["texts"])
        if (
            texts.shape != mask.shape
            or texts.dtype.kind not in "iu"
            or texts.min() < 0
            or texts.max() >= len(self.tasks)
        ):
            raise ValueError(f"texts is {texts.tolist()}; expected {self.num_envs} indices of the trace's texts")
        return mask, texts.astype(np.int64)

    def _seeds(self, seed: Any) -> list[int | None]:
        """Return the seed of every environment."""
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int):
            return [seed + i for i in range(self.num_envs)]
        if not isinstance(seed, (list, tuple)) or len(seed) != self.num_envs:
            raise ValueError(
                f"seed is {seed!r}; expected a whole number, or a list of {self.num_envs}, one per environment"
            )
        return list(seed)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Carry out a decision in every environment.

        Raises:
            ValueError: an action that is not a whole number in range, the wrong number of actions, or no text to
                continue.
        """
        self._check_open()
        actions = self._checked(actions)
        live: np.ndarray | bool = ~self.ended if self.autoreset_mode == AutoresetMode.NEXT_STEP else True
        under_way = self.under_way
        done = under_way.act(actions, live)
        draft = (self.pending + done.draft) * live
        policy = np.full(self.num_envs, self.policy_seconds) * live
        seconds = draft + done.verify + policy
        left = self.last - under_way.row
        emitted = np.where(done.verified, np.minimum(done.accepted + 1, left), 0)
        accepted = np.where(done.verified, np.minimum(done.accepted, left), 0)
        under_way.row += emitted
        self.forwards += int(done.verified.sum())
        finished = done.verified & (under_way.row == self.last)
        self.spent += seconds
        self.cycle_spent += seconds
        whole = np.where(done.verified, self.cycle_spent, 1.0)
        rewards = self.control.rewards[self.reward_name](
            Decision(emitted, emitted, accepted, seconds, whole, self.pace[under_way.clock])
        )
        values = self._blank() | dict(done.details)
        values |= {"emitted": emitted, "accepted": accepted, "saved": emitted - self.plain[under_way.clock] * seconds}
        beside = np.maximum(0, accepted - (done.accepted - done.beside))
        counts = {"drafted": done.drafted, "verified": done.sent, "beside": beside}
        values |= {name: np.where(done.verified, n, 0) for name, n in counts.items()}
        values["seconds"] |= {"draft": draft, "verify": done.verify, "policy": policy}
        self.brought = values
        self._end_cycles(np.flatnonzero(done.verified), accepted, emitted, finished, live)
        terminated = done.verified.copy() if self.settings.episode == "cycle" else finished
        observations = self._observe(slice(None), ~finished)
        infos = self._reset_ended(observations, values, terminated, finished)
        return observations, rewards, terminated, np.zeros(self.num_envs, bool), infos

    def _reset_ended(
        self, observations: np.ndarray, values: dict[str, Any], terminated: np.ndarray, finished: np.ndarray
    ) -> dict[str, Any]:
        """Begin texts in environments whose episode has ended, as ``autoreset_mode`` says, and write their observations
        into ``observations``; return the infos of the step."""
        before, self.ended = self.ended, terminated.copy()
        everywhere, begins = np.ones(self.num_envs, bool), np.zeros(0, np.int64)
        summary = gathered(self._summary(finished), finished) if finished.any() else {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP and terminated.any():
            infos = gathered(cleared(values, terminated), everywhere)
            infos |= {"final_obs": observations.copy(), "_final_obs": terminated.copy()}
            infos |= {"final_info": gathered(values, terminated) | summary, "_final_info": terminated.copy()}
            begins = np.flatnonzero(finished)
        else:
            infos = gathered(values, everywhere) | summary
        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            begins = np.flatnonzero(before & (self.under_way.row == self.last))
        if len(begins):
            self._begin(begins)
            observations[begins] = self._observe(begins)
        return infos

    def _blank(self) -> dict[str, Any]:
        """Return the infos of a reset."""
        return blank(self.num_envs, self.control.trace_kind == "portfolio")

    def _summary(self, finished: np.ndarray) -> dict[str, np.ndarray]:
        """Return the further entries that the info of a text's last step has, for every environment."""
        tokens = self.last - self.begun + 1
        speedup = (tokens - 1) / np.maximum(self.spent, 1e-12) / self.plain[self.under_way.clock]
        for text in set(self.text[finished].tolist()):
            if self.words[text] is None:
                ids = self.trace.columns["tokens"][self.starts[text] : self.lasts[text] + 1].tolist()
                tokenizer = load_tokenizer(self.trace.manifest.target)
                self.words[text] = str(tokenizer.decode(ids, skip_special_tokens=True))
        return {"text": self.words[self.text], "task": self.tasks[self.text], "tokens": tokens, "speedup": speedup}

    def _checked(self, actions: Any) -> np.ndarray:
        """Return the actions of all environments after checking them."""
        given = np.asarray(actions)
        fits = given.shape == (self.num_envs,) and given.dtype.kind in "iu"
        if not fits or given.min() < 0 or given.max() >= self.choices:
            raise ValueError(
                f"actions are not {self.num_envs} of {self.single_action_space}: expected whole numbers from 0 to "
                f"{self.choices - 1}, of the shape ({self.num_envs},), not {given.dtype} of the shape {given.shape}"
            )
        if not self.has_text.all():
            raise ValueError("there are no texts to continue; call reset() first")
        if self.autoreset_mode == AutoresetMode.DISABLED and self.ended.any():
            raise ValueError(
                f"{int(self.ended.sum())} environments have ended; call reset(options={{'reset_mask': mask}}) first"
            )
        return given.astype(np.int64)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the environments are closed; make new ones")

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return an attribute for every environment; all share one unless it is kept per environment."""
        value = getattr(self, name)
        own = name in ("text", "last", "begun", "pending", "spent", "has_text", "ended")
        return tuple(value) if own else (value,) * self.num_envs

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute: a value for all environments, or a list of equal ones.

        Raises:
            ValueError: an unknown attribute, or a list of the wrong length or of different values.
        """
        if name not in vars(self):
            raise ValueError(f"there is no attribute {name!r} to set")
        values = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(values) != self.num_envs or any(value != values[0] for value in values):
            raise ValueError(f"values are {values!r}; expected one, or {self.num_envs} that are equal: they are shared")
        setattr(self, name, values[0])

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method once and return its result for every environment; return an attribute as ``get_attr`` does."""
        value = getattr(self, name)
        return (value(*args, **kwargs),) * self.num_envs if callable(value) else self.get_attr(name)

    def _end_cycles(
        self,
        which: np.ndarray,
        accepted: np.ndarray,
        emitted: np.ndarray,
        finished: np.ndarray,
        live: np.ndarray | bool,
    ) -> None:
        """Record the cycles that ended in environments ``which``, and draft for the next ones."""
        if "recent" in self.control.slices:
            self.recent.push(which, accepted[which, None])
        self.cycle_spent[which] = 0.0
        self.pending *= ~np.asarray(live)
        self.pending[which] = self.under_way.verified(which, accepted, emitted, finished)

    def _begin(self, which: np.ndarray, texts: np.ndarray | None = None) -> None:
        """Begin texts in environments ``which``: those given, or drawn ones."""
        if len(self.cost_tables) > 1:
            self.under_way.clock[which] = self.draws.integers(which, len(self.cost_tables))
        texts = self._drawn(which) if texts is None else texts
        if (self.lasts[texts] == self.starts[texts]).any():
            raise EndedText("the target's first token already ends a text; give other texts")
        self.text[which], self.last[which], self.begun[which] = texts, self.lasts[texts], self.starts[texts]
        self.under_way.row[which] = self.starts[texts]
        self.recent.clear(which)
        self.spent[which] = self.cycle_spent[which] = 0.0
        self.pending[which] = self.under_way.start(which)

    def _drawn(self, which: np.ndarray) -> np.ndarray:
        """Draw texts and return them; those that end at their first token are drawn again."""
        texts: np.ndarray = self.texts[self.draws.integers(which, len(self.texts))]
        for _ in range(99):
            again = np.flatnonzero(self.lasts[texts] == self.starts[texts])
            if not len(again):
                break
            texts[again] = self.texts[self.draws.integers(which[again], len(self.texts))]
        return texts

    def _observe(self, which: np.ndarray | slice, alive: np.ndarray | None = None) -> np.ndarray:
        """Return the observations ``[n, numbers]`` of environments ``which``; ``alive`` is false where a text has
        ended."""
        row, text, slices = self.under_way.row[which], self.text[which], self.control.slices
        out = np.zeros((len(row), self.single_observation_space.shape[0]), np.float32)  # type: ignore[index]
        self.under_way.observe(out, which, np.ones(len(row), bool) if alive is None else alive)
        emitted = row - self.begun[which] + 1
        if "recent" in slices:
            at, cycles = slices["recent"].start, self.recent.cycles[which]
            for i, window in enumerate(WINDOWS):
                mean = self.recent.sums[i, which, 0] / np.clip(cycles, 1, window)
                out[:, at + i] = np.minimum(1.0, mean / (self.control.max_depth + 1))
        if "position" in slices:
            out[:, slices["position"].start] = emitted / self.max_new_tokens
            out[:, slices["context"].start] = np.minimum(1.0, (self.prompt_lengths[text] + emitted) / CONTEXT_UNIT)
        if "length" in slices:
            out[:, slices["length"]] = ((self.prompt_lengths[text] + emitted) / LENGTH_UNIT)[:, None]
        return out


def check_count(num_envs: Any) -> None:
    """Refuse a wrong number of environments.

    Raises:
        ValueError: the number is not a whole number of 1 or more.
    """
    if not isinstance(num_envs, int) or isinstance(num_envs, bool) or num_envs < 1:
        raise ValueError(f"num_envs is {num_envs!r}; expected 1 or more")


def autoreset(mode: Any) -> AutoresetMode:
    """Return Gymnasium's mode of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(mode, AutoresetMode):
        choice("autoreset_mode", mode, [known.value for known in AutoresetMode])
    return AutoresetMode(mode)
