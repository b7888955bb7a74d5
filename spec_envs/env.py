"""The one Gymnasium environment: a control problem over a live decoder."""

from __future__ import annotations

import functools
import logging
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle

from spec_envs import recordings, render
from spec_envs.controls import CONTROLS, make_control
from spec_envs.controls.policy import checked_action
from spec_envs.decoding.clock import PricedClock, WallClock
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.traces.recording import MAX_NEW_TOKENS
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.processes import in_worker
from spec_envs.prompts.sets import Prompt, encode_all, encode_prompt, load_prompts
from spec_envs.settings import RENDER_MODES, Settings

LOG = logging.getLogger(__name__)


class EndedText(ValueError):
    """The target's first token already ends the text."""


class SpecEnv(gym.Env[np.ndarray, int], EzPickle):
    """Control of speculative decoding, one decision per step. The problem itself is a :class:`Control`.

    Args:
        control: which problem: the name of its control (``"depth"``, ``"budget"``, …), an environment's id, or where
            the control is found, ``"module:Class"``.
        keywords: those of :class:`spec_envs.settings.Settings`, which describes each, and of the control.

    A copy (pickled, or by ``copy.deepcopy``) is another environment with the same keyword arguments, to be reset first.

    Attributes:
        settings: the shared keyword arguments.
        control: the problem.
        decoder: what decodes under it.
        prompts: what texts are drawn from; one that is listed twice is drawn twice as often.
        encoded: token ids by prompt.
        prompt: of the text under way; None before the first reset.
        texts, turn: how many texts were drawn since the last seed, and with ``switch_every`` the prompt set whose turn
            it is.

    Raises:
        TypeError: a keyword that neither ``Settings`` nor the control has; the nearest one is named.
        ValueError: a value that makes no sense; the message names what was expected.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012 - Gymnasium's own declaration

    def __init__(self, control: str, **keywords: Any):
        EzPickle.__init__(self, control, **keywords)
        kind = CONTROLS[control]
        self.settings = settings = Settings.read(kind, keywords)
        self.control = make_control(control, keywords | dict(settings))
        self.action_space = self.control.action_space  # type: ignore[assignment]
        self.observation_space = self.control.observation_space
        self.reward_name = settings.reward or next(iter(kind.rewards))
        self.given_pace, self.policy_seconds = settings.pace, settings.policy_seconds
        self.render_mode = settings.render_mode
        self.recording = None if settings.trace is None else recordings.load(settings.trace)
        self.max_new_tokens = self._longest()
        self.clocks = self._open_clocks()
        self.decoder = self._open_decoder()
        self.prompts, self.encoded = self._read_prompts()
        self.texts, self.turn = 0, ""
        self.prompt: Prompt | None = None
        self.closed = False
        self._mark: dict[str, float] = {}

    def _open_clocks(self) -> list[WallClock]:
        """Return the clocks, of which one is in force at a time; refuse to measure where that would mislead."""
        clocks = recordings.clocks_for(self.settings.clock, self.settings.device, self.recording)
        if not clocks[0].priced:
            if self.settings.cost_features:
                raise ValueError("cost_features need cost tables; a measured clock has none")
            if in_worker():
                raise ValueError(
                    "a measured clock in a worker process would be disturbed by its siblings; "
                    "use a cost table (clock=…) or one process"
                )
        return clocks

    def _open_decoder(self) -> Engine:
        """Return what decodes, after a check that the recording, if there is one, fits all settings."""
        given = self.settings
        models = given.model_dump(include={"target", "drafter", "device", "dtype", "temperature", "top_p"})
        decoder = self.control.open(self.clocks[0], given.trace, **models)
        if self.recording:
            self.recording.check_settings(dict(given))
            self.recording.check(self.control, self.max_new_tokens)
        return decoder

    def _read_prompts(self) -> tuple[list[Prompt], dict[Prompt, list[int]]]:
        """Return the prompts that texts are drawn from, one that is listed twice included twice, and the ids of
        each."""
        given = self.settings
        if self.recording:
            recorded = self.recording.prompts(given.split, given.prompts)
            encoded = {Prompt(task, str(i)): ids for i, (task, ids) in enumerate(recorded)}
            chosen = list(encoded)
        else:
            self.tokenizer = load_tokenizer(given.target)
            chosen = load_prompts(given.prompts, given.split, given.data_dir)
            encoded = dict(encode_all(self.tokenizer, chosen, given.template, given.date))
        encoded = self._fitting(encoded)
        return [prompt for prompt in chosen if prompt in encoded], encoded

    @functools.cached_property
    def best_static(self) -> float:
        """Speed of the pair's best static setting in units of plain decoding; 1 where it was not measured."""
        if self.recording:
            return self.recording.static_over_plain
        target, drafter = self.settings.target, self.settings.drafter
        return self.control.static_over_plain(
            target, self.control.default_drafter(target) if drafter == "auto" else drafter
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a text, or with ``episode="cycle"`` its next cycle.

        Args:
            options: ``{"prompt": text or Prompt}`` sets the prompt and begins a new text.

        Raises:
            ValueError: another option, or a prompt of another type.
        """
        self._check_open()
        before, self.prompt = self.prompt, None  # a reset that is refused leaves no text to continue
        super().reset(seed=seed)
        if seed is not None:
            self.texts, self.turn = 0, ""
        known = options is None or (isinstance(options, dict) and not set(options) - {"prompt"})
        given = options.get("prompt") if known and options else None
        if not known or not isinstance(given, (str, Prompt, type(None))):
            raise ValueError(f"options is {options!r}; expected {{'prompt': a text or a Prompt}}")
        goes_on = before is not None and self.settings.episode == "cycle" and not self.decoder.finished
        if seed is None and given is None and goes_on:
            self.prompt = before
        else:
            self._begin_text(given)
        observation = self.control.observe(self.decoder)
        if self.render_mode == "human":
            self.render()
        return observation, self._info(None, dict.fromkeys(self._mark, 0.0), 0.0)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Carry out a decision. What the next decision needs is drafted here too, and charged to the next step."""
        self._check_open()
        chosen = checked_action(self.control.action_space, action)
        if self.prompt is None or self.decoder.finished:
            raise ValueError("there is no text to continue; call reset() first")
        clock = self.decoder.clock
        clock.charge("policy", self.policy_seconds)
        cycle = self.control.act(self.decoder, chosen)
        seconds = clock.since(self._mark)
        self._mark = dict(clock.totals)
        spent = sum(seconds.values())
        info = self._info(cycle, seconds, spent)
        reward = self.control.reward(self.reward_name, cycle, spent, self.pace)
        terminated = self.decoder.finished or (self.settings.episode == "cycle" and cycle is not None)
        observation = self.control.observe(self.decoder)
        if self.render_mode == "human":
            self.render()
        return observation, reward, terminated, False, info

    def render(self) -> str | np.ndarray | None:
        """Return the text so far and the tree: coloured text, or a picture ``[height, width, 3]``.

        Raises:
            ValueError: there is no text yet, or the environment is closed.
        """
        self._check_open()
        if self.prompt is None:
            raise ValueError("there is no text to show; call reset() first")
        if self.render_mode == "rgb_array":
            return render.picture(self.decoder)
        if self.render_mode == "ansi":
            return render.ansi(self.decoder)
        if self.render_mode == "human":
            print(render.ansi(self.decoder), flush=True)
        return None

    def close(self) -> None:
        """End what the decoder runs outside this process; may be called twice."""
        self.closed = True
        self.decoder.close()

    def _check_open(self) -> None:
        """Refuse an environment that was closed."""
        if self.closed:
            raise ValueError("the environment is closed; make another one")

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding without a network: measured once per process, or priced."""
        clock = self.decoder.clock
        return 1 / (clock.table.seconds("verify", 1) if isinstance(clock, PricedClock) else self._plain_seconds)

    @functools.cached_property
    def _plain_seconds(self) -> float:
        """Seconds per step of plain decoding by the target, without the network."""
        return self.decoder.plain_seconds()

    @property
    def pace(self) -> float:
        """Tokens per second that a second costs: given, or the speed of the pair's best static setting."""
        return self.given_pace if self.given_pace is not None else self.plain_rate * self.best_static

    def _longest(self) -> int:
        """Return the most tokens of a text."""
        if self.settings.max_new_tokens is not None:
            return self.settings.max_new_tokens
        return self.recording.max_new_tokens if self.recording else MAX_NEW_TOKENS

    def _fitting(self, encoded: dict[Prompt, list[int]]) -> dict[Prompt, list[int]]:
        """Refuse prompts that would not fit when their turn comes; return the others, without logged conversations that
        are too long."""
        context = self.decoder.context
        room = context - self.max_new_tokens - self.control.max_depth - 1
        if room < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; the context is {context} tokens in all")
        long = {prompt for prompt, ids in encoded.items() if prompt.logged and len(ids) > room}
        if long and len(long) < len(encoded):
            LOG.warning("left out %d of %d prompts, longer than %d tokens", len(long), len(encoded), room)
            encoded = {prompt: ids for prompt, ids in encoded.items() if prompt not in long}
        longest = max(encoded, key=lambda prompt: len(encoded[prompt]))
        if (length := len(encoded[longest])) > room:
            raise ValueError(
                f"a prompt of {longest.task} has {length} tokens; with max_new_tokens {self.max_new_tokens} the "
                f"context of {context} has room for {room}: choose other prompts or lower max_new_tokens"
            )
        return encoded

    def _begin_text(self, given: str | Prompt | None) -> None:
        """Begin the text of a given prompt, or of one that is drawn."""
        if isinstance(given, str):
            given = Prompt("given", given)
        if given is not None and self.recording and given not in self.encoded:
            raise ValueError(f"{self.settings.trace!r} has prompts of its own; another text cannot be given")
        if len(self.clocks) > 1:
            self.decoder.clock = self.clocks[self.np_random.integers(len(self.clocks))]
        for _ in range(100):  # a prompt whose first token is EOS is not used
            prompt = given or self._draw_prompt()
            ids = self.encoded.get(prompt) or encode_prompt(
                self.tokenizer, prompt, self.settings.template, self.settings.date
            )
            self.decoder.start(ids, self.max_new_tokens, self.np_random)
            if given or not self.decoder.finished:
                break
        if self.decoder.finished:
            raise EndedText("the target's first token already ends the text; give another prompt")
        self.prompt = prompt
        self.control.reset(self.np_random, prompt.task)
        self.texts += given is None
        self._mark = dict(self.decoder.clock.totals)
        self._text_began = dict(self.decoder.clock.totals)

    def _draw_prompt(self) -> Prompt:
        """Return any prompt, or with ``switch_every`` one of the set whose turn it is."""
        if not self.settings.switch_every:
            return self.prompts[self.np_random.integers(len(self.prompts))]
        tasks = list(dict.fromkeys(prompt.task for prompt in self.prompts))
        if self.texts % self.settings.switch_every == 0 and len(tasks) > 1:
            others = [task for task in tasks if task != self.turn]
            self.turn = others[self.np_random.integers(len(others))]
        ours = [prompt for prompt in self.prompts if prompt.task == (self.turn or tasks[0])]
        return ours[self.np_random.integers(len(ours))]

    def _info(self, cycle: Cycle | None, seconds: dict[str, float], spent: float) -> dict[str, Any]:
        """Return the info of a step that took these seconds, by part and ``spent`` in all, and ended this cycle, if
        any."""
        info = {
            "emitted": cycle.emitted if cycle else 0,
            "accepted": cycle.accepted if cycle else 0,
            "drafted": cycle.drafted if cycle else 0,
            "verified": cycle.verified if cycle else 0,
            "bytes_up": cycle.bytes_up if cycle else 0,
            "bytes_down": cycle.bytes_down if cycle else 0,
            "seconds": {part: s for part, s in seconds.items() if part != "prefill"},
            "saved": (self.control.worth(cycle) if cycle else 0.0) - self.plain_rate * spent,
        }
        info |= self.control.details(self.decoder, cycle)
        if cycle and self.decoder.finished:
            total = sum(self.decoder.clock.since(self._text_began).values())
            tokens = len(self.decoder.tokens)
            assert self.prompt is not None
            info["text"] = self.decoder.detokenize(self.decoder.tokens)
            info["task"] = self.prompt.task
            info["tokens"] = tokens
            # The first token is the prefill's and of no cycle.
            worth = sum(self.control.worth(done) for done in self.decoder.cycles)
            info["speedup"] = worth / total / self.plain_rate
        return info
