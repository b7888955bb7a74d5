"""The Gymnasium environment of every problem: a control drives a decoder, one decision per step."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle

from spec_envs import recordings
from spec_envs.controls import CONTROLS, make_control
from spec_envs.controls.policy import checked_action
from spec_envs.decoding.clock import PricedClock, WallClock
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.traces.recording import MAX_NEW_TOKENS
from spec_envs.processes import in_worker
from spec_envs.prompts.sets import Prompt
from spec_envs.prompts.stream import PromptStream, given_prompt
from spec_envs.rendering.ansi import ansi
from spec_envs.rendering.view import keep_trees
from spec_envs.settings import RENDER_MODES, Settings


class EndedText(ValueError):
    """The target's first token already ends the text."""


class SpecEnv(gym.Env[np.ndarray, int], EzPickle):
    """Control of speculative decoding, one decision per step. The problem itself is a :class:`Control`.

    Args:
        control: the problem: the name of its control (``"depth"``, ``"budget"``, …), an environment's id, or
            ``"module:Class"``.
        keywords: those of :class:`spec_envs.settings.Settings`, which describes each, and those of the control.

    A copy (pickled, or by ``copy.deepcopy``) is another environment with the same keyword arguments, to be reset first.

    Attributes:
        settings: the shared keyword arguments.
        control: the problem.
        decoder: the engine that the control drives.
        recording: the recording that replaces models, or None.
        prompts: the prompts that texts are drawn from.
        prompt: prompt of the text under way; None before the first reset.

    Raises:
        TypeError: a keyword that neither ``Settings`` nor the control has; the nearest one is named.
        ValueError: a value that is not allowed; the message names what was expected.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 2}  # noqa: RUF012 - Gymnasium's own declaration

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
        longest = self.recording.max_new_tokens if self.recording else MAX_NEW_TOKENS
        self.max_new_tokens = longest if settings.max_new_tokens is None else settings.max_new_tokens
        self.clocks = self._open_clocks()
        self.decoder = self._open_decoder()
        if self.render_mode is not None:
            keep_trees(self.decoder)
        self.prompts = PromptStream(settings, self.recording)
        self.prompts.fit(self.decoder.context, self.max_new_tokens, self.control.max_depth)
        self.prompt: Prompt | None = None
        self.closed = False
        self._mark: dict[str, float] = {}
        self._ended = False  # whether the last step ended a cycle

    def _open_clocks(self) -> list[WallClock]:
        """Return the clocks, one of which is in force for each text; refuse to measure where that would mislead."""
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
        """Return the engine that the control drives; refuse a recording that does not fit the settings."""
        given = self.settings
        models = given.model_dump(include={"target", "drafter", "device", "dtype", "temperature", "top_p"})
        decoder = self.control.open(self.clocks[0], given.trace, **models)
        if self.recording:
            self.recording.check_settings(dict(given))
            self.recording.check(self.control, self.max_new_tokens)
        return decoder

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
            self.prompts.restart()
        given = given_prompt(options)
        continues = before is not None and self.settings.episode == "cycle" and not self.decoder.finished
        if seed is None and given is None and continues:
            self.prompt = before
        else:
            self._begin_text(given)
        self._ended = False
        observation = self.control.observe(self.decoder)
        if self.render_mode == "human":
            self.render()
        return observation, self._info(None, dict.fromkeys(self._mark, 0.0), 0.0)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Carry out a decision. What the next decision needs is drafted here, too, and charged to the next step."""
        self._check_open()
        chosen = checked_action(self.control.action_space, action)
        prompt = self.prompt
        if prompt is None or self.decoder.finished:
            raise ValueError("there is no text to continue; call reset() first")
        clock = self.decoder.clock
        clock.charge("policy", self.policy_seconds)
        cycle = self.control.act(self.decoder, chosen)
        self._ended = cycle is not None
        seconds = clock.since(self._mark)
        self._mark = dict(clock.totals)
        spent = sum(seconds.values())
        info = self._info(cycle, seconds, spent)
        if cycle and self.decoder.finished:
            info |= self._summary(prompt)
        reward = self.control.reward(self.reward_name, cycle, spent, self.pace)
        terminated = self.decoder.finished or (self.settings.episode == "cycle" and cycle is not None)
        observation = self.control.observe(self.decoder)
        if self.render_mode == "human":
            self.render()
        return observation, reward, terminated, False, info

    def render(self) -> str | np.ndarray | None:
        """Return the text so far, what is drafted or what became of it if the last step ended a cycle, and totals:
        coloured text, or a picture ``[480, 800, 3]``, uint8; None after printing (``"human"``).

        Raises:
            ValueError: there is no text yet, or the environment is closed.
        """
        self._check_open()
        if self.prompt is None:
            raise ValueError("there is no text to show; call reset() first")
        last = self.decoder.cycles[-1] if self._ended else None
        if self.render_mode == "rgb_array":
            return self.picture(last)
        if self.render_mode == "ansi":
            return ansi(self.decoder, last)
        if self.render_mode == "human":
            print(ansi(self.decoder, last), flush=True)
        return None

    def picture(self, last: Cycle | None) -> np.ndarray:
        """Return a picture ``[480, 800, 3]``, uint8, of the last cycle of a text, or of the cycle under way for None.

        Raises:
            ValueError: there is no text yet.
        """
        from spec_envs.rendering.picture import picture  # matplotlib takes half a second to import, and 20 MB

        if self.prompt is None:
            raise ValueError("there is no text to show; call reset() first")
        title = f"{self.prompt.task}, recorded text {self.prompt.text}" if self.recording else self.prompt.text
        return picture(self.decoder, title, last, self.plain_rate)

    def close(self) -> None:
        """Release resources outside this process; may be called twice."""
        self.closed = True
        self.decoder.close()

    def _check_open(self) -> None:
        """Refuse an environment that was closed."""
        if self.closed:
            raise ValueError("the environment is closed; make another one")

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding without a network, measured once per process or priced."""
        clock = self.decoder.clock
        return 1 / (clock.table.seconds("verify", 1) if isinstance(clock, PricedClock) else self._plain_seconds)

    @functools.cached_property
    def _plain_seconds(self) -> float:
        """Seconds of a plain decoding step of the target, without a network."""
        return self.decoder.plain_seconds()

    @property
    def pace(self) -> float:
        """Tokens per second that a second costs, as given, or else the speed of the pair's best static setting."""
        return self.given_pace if self.given_pace is not None else self.plain_rate * self.best_static

    def _begin_text(self, given: Prompt | None) -> None:
        """Begin the text of a given prompt, or of one that is drawn."""
        if len(self.clocks) > 1:
            self.decoder.clock = self.clocks[self.np_random.integers(len(self.clocks))]
        for _ in range(100):  # a prompt whose first token is EOS is skipped
            prompt = given or self.prompts.draw(self.np_random)
            self.decoder.start(self.prompts.ids(prompt), self.max_new_tokens, self.np_random)
            if given or not self.decoder.finished:
                break
        if self.decoder.finished:
            raise EndedText("the target's first token already ends the text; give another prompt")
        self.prompt = prompt
        self.control.reset(self.np_random, prompt.task)
        self.prompts.texts += given is None
        self._mark = dict(self.decoder.clock.totals)
        self._text_began = dict(self.decoder.clock.totals)

    def _info(self, cycle: Cycle | None, seconds: dict[str, float], spent: float) -> dict[str, Any]:
        """Return the info of a step.

        Args:
            cycle: the cycle that the step ended, or None.
            seconds: seconds of the step by part.
            spent: their sum.
        """
        info = {
            "emitted": cycle.emitted if cycle else 0,
            "accepted": cycle.accepted if cycle else 0,
            "drafted": cycle.drafted if cycle else 0,
            "verified": cycle.verified if cycle else 0,
            "beside": cycle.beside if cycle else 0,
            "bytes_up": cycle.bytes_up if cycle else 0,
            "bytes_down": cycle.bytes_down if cycle else 0,
            "seconds": {part: s for part, s in seconds.items() if part != "prefill"},
            "saved": (self.control.counted_tokens(cycle) if cycle else 0.0) - self.plain_rate * spent,
        }
        info |= self.control.details(self.decoder, cycle)
        return info

    def _summary(self, prompt: Prompt) -> dict[str, Any]:
        """Return the further entries that the info of a text's last step has."""
        total = sum(self.decoder.clock.since(self._text_began).values())
        # The first token belongs to the prefill and to no cycle.
        counted = sum(self.control.counted_tokens(done) for done in self.decoder.cycles)
        return {
            "text": self.decoder.detokenize(self.decoder.tokens),
            "task": prompt.task,
            "tokens": len(self.decoder.tokens),
            "speedup": counted / total / self.plain_rate,
        }
