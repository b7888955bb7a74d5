"""The one Gymnasium environment: a control problem over a live decoder."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
from collections.abc import Sequence
from typing import Any, get_type_hints

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle
from pydantic import TypeAdapter, ValidationError

from spec_envs import recordings, render
from spec_envs.checked import check_number, choice
from spec_envs.controls import CONTROLS, Control, make_control
from spec_envs.controls.base import checked_action
from spec_envs.decoding.clock import PricedClock
from spec_envs.decoding.llama_cpp.decoder import LlamaServerDecoder
from spec_envs.decoding.loading import DEFAULT_TARGET, plain_seconds
from spec_envs.decoding.traces.recording import MAX_NEW_TOKENS
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.keywords import check_ranges, in_worker
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.prompts.sets import Prompt, encode_all, encode_prompt, load_prompts
from spec_envs.recordings import clocks_for


class EndedText(ValueError):
    """The target's first token already ends the text."""


class SpecEnv(gym.Env[np.ndarray, int], EzPickle):
    """Control of speculative decoding, one decision per step. The problem itself is a :class:`Control`.

    Args:
        control: which problem: ``"depth"``, ``"budget"``, ``"tree"``, ``"k"``, ``"topk"`` or ``"dvi"``.
        target: model to decode: a name of models.yml, a hub id, a folder, or a GGUF file.
        drafter: EAGLE-3 head or, for chains, draft model: a name of models.yml, a folder, hub id or GGUF file;
            ``"lookup"`` is prompt lookup, ``"lookup+NAME"`` that in front of a draft model, ``"exit:N"`` an untrained early
            exit of the target and the run folder of a trained one that exit; ``"auto"`` the target's own in models.yml.
        device, dtype: ``"auto"``, or as in torch (``"cpu"``, ``"cuda"``; ``"int8"``, ``"bfloat16"``, ``"float32"``).
        prompts: prompt sets, separated by commas, or ``"all"``.
        data_dir: folder with ``{name}/question.jsonl`` files instead of the shipped prompts.
        switch_every: texts after which another prompt set has its turn; 0 draws every text from all sets.
        split: ``"train"``, ``"validation"``, ``"test"`` or ``"all"``.
        template: Jinja chat template for a model without one; ``"none"`` takes prompts as they are.
        date: which day it is for templates that write it, ``YYYY-MM-DD``; by default always the same one
            (``spec_envs.prompts.templates.DATE``), or the one that a trace was recorded with.
        max_new_tokens: most tokens of a text, the first one included; by default 128, or as many as a trace was recorded with.
        temperature, top_p: sampling of the target; temperature 0 is greedy, the control's own default where none is given.
        trace: what plays draft model and target instead of models: the folder of a trace that `make trace` recorded, for
            trees and chains, exactly; a synthetic profile (a name of ``data/profiles``, or a JSON file), for chains; over a
            link an expected-acceptance trace (a name of ``data/traces``, or an npz file), approximately.
        clock: ``"wall"`` measures; the name or path of a cost table prices forwards instead, which makes the
            environment deterministic. Of several tables one is drawn per episode. A profile brings its own.
        episode: ``"prompt"`` or ``"cycle"`` (the text goes on over resets).
        reward: ``"saved"``; ``"ltd"`` for trees and chains, ``"rl_adapter"`` over a link, ``"accepted"`` at an exit, where it
            is the default.
        pace: tokens per second that a second costs under ``"saved"``; by default that of the pair's best static
            setting: plain speed under this clock, times ``static_over_plain`` of models.yml (1 where the pair
            is not listed there).
        observation: ``"default"``; ``"ltd"`` for trees, ``"counters"`` for chains, ``"rl_adapter"`` over a link,
            ``"policy"`` at an exit.
        cost_features: append the clock's cost table to the observation.
        policy_seconds: charged for every decision (an experiment sets the agent's measured time).
        render_mode: None, ``"ansi"``, ``"human"`` or ``"rgb_array"``.
        own: keyword arguments of the control (its docstring lists them).

    A copy (pickled, or by ``copy.deepcopy``) is another environment with the same keyword arguments, to be reset first.

    Raises:
        TypeError: a keyword that neither this class nor the control has; the nearest one is named.
        ValueError: a value that makes no sense; the sentence says what was expected.
    """

    metadata = {  # noqa: RUF012 - Gymnasium's own declaration
        "render_modes": ["ansi", "human", "rgb_array"],
        "render_fps": 4,
    }

    def __init__(
        self,
        control: str,
        *,
        target: str = DEFAULT_TARGET,
        drafter: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        prompts: str = "all",
        data_dir: str | None = None,
        switch_every: int = 0,
        split: str = "train",
        template: str | None = None,
        date: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        trace: str | None = None,
        clock: str | Sequence[str] = "wall",
        episode: str = "prompt",
        reward: str | None = None,
        pace: float | None = None,
        observation: str = "default",
        cost_features: bool = False,
        policy_seconds: float = 0.0,
        render_mode: str | None = None,
        **own: Any,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "control", "own", "__class__")}
        EzPickle.__init__(self, control, **given, **own)
        kind = CONTROLS[control]
        check_keywords(kind, given | own)
        reward = next(iter(kind.rewards)) if reward is None else reward
        choice("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        recording = recordings.load(trace) if trace is not None else None
        if max_new_tokens is None:
            max_new_tokens = recording.max_new_tokens if recording else MAX_NEW_TOKENS
        check_ranges(kind, given | {"reward": reward, "max_new_tokens": max_new_tokens})
        check_number("switch_every", switch_every, lambda texts: texts >= 0, "texts, or 0 for none")
        self.control = make_control(control, given | own)
        self.clocks = clocks_for(clock, device, recording)
        if not self.clocks[0].priced:
            if cost_features:
                raise ValueError("cost_features need cost tables; a measured clock has none")
            if in_worker():
                raise ValueError(
                    "a measured clock in a worker process would be disturbed by its siblings; "
                    "use a cost table (clock=…) or one process"
                )
        self.action_space = self.control.action_space  # type: ignore[assignment]
        self.observation_space = self.control.observation_space
        self.target, self.template, self.max_new_tokens, self.trace = target, template, max_new_tokens, trace
        self.date = date
        models = {"target": target, "drafter": drafter, "device": device, "dtype": dtype}
        self.decoder = self.control.open(self.clocks[0], trace, **models, temperature=temperature, top_p=top_p)
        if recording:
            recording.check_settings(given)
            recording.check(self.control, max_new_tokens)
            self.best_static = recording.static_over_plain
            recorded = recording.prompts(split, prompts)
            self.encoded = {Prompt(task, str(i)): ids for i, (task, ids) in enumerate(recorded)}
            chosen = list(self.encoded)
        else:
            drafter = self.control.default_drafter(target) if drafter == "auto" else drafter
            self.best_static = self.control.static_over_plain(target, drafter)
            self.tokenizer = load_tokenizer(target)
            chosen = load_prompts(prompts, split, data_dir)
            self.encoded = dict(encode_all(self.tokenizer, chosen, template, date))
        self._check_lengths()
        self.prompts = [prompt for prompt in chosen if prompt in self.encoded]  # equal ones as often as there are
        self.switch_every, self.texts, self.turn = switch_every, 0, ""
        self.episode, self.reward_name, self.given_pace = episode, reward, pace
        self.policy_seconds, self.render_mode = policy_seconds, render_mode
        self.prompt: Prompt | None = None
        self.closed = False
        self._mark: dict[str, float] = {}

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
        before, self.prompt = self.prompt, None  # a reset that is refused leaves no text to go on with
        super().reset(seed=seed)
        if seed is not None:
            self.texts, self.turn = 0, ""
        known = options is None or (isinstance(options, dict) and not set(options) - {"prompt"})
        given = options.get("prompt") if known and options else None
        if not known or not isinstance(given, (str, Prompt, type(None))):
            raise ValueError(f"options is {options!r}; expected {{'prompt': a text or a Prompt}}")
        goes_on = before is not None and self.episode == "cycle" and not self.decoder.finished
        if seed is None and given is None and goes_on:
            self.prompt = before
        else:
            self._begin_text(given)
        observation = self.control.observe(self.decoder)
        if self.render_mode == "human":
            self.render()
        return observation, self._info(None, dict.fromkeys(self._mark, 0.0))

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Carry out a decision. What the next decision needs is drafted here too, and charged to the next step."""
        self._check_open()
        chosen = checked_action(self.control.action_space, action)
        if self.prompt is None or self.decoder.finished:
            raise ValueError("there is no text to go on with; call reset() first")
        clock = self.decoder.clock
        clock.charge("policy", self.policy_seconds)
        cycle = self.control.act(self.decoder, chosen)
        seconds = clock.since(self._mark)
        self._mark = dict(clock.totals)
        info = self._info(cycle, seconds)
        reward = self.control.reward(self.reward_name, cycle, sum(seconds.values()), self.pace)
        terminated = self.decoder.finished or (self.episode == "cycle" and cycle is not None)
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
        """End what the decoder runs beside this process; may be called twice."""
        self.closed = True
        self.decoder.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the environment is closed; make another one")

    @property
    def plain_rate(self) -> float:
        """Tokens per second of plain decoding: measured once per process, or priced."""
        clock = self.decoder.clock
        if isinstance(clock, PricedClock):
            return 1 / clock.table.seconds("verify", 1)
        if isinstance(self.decoder, LlamaServerDecoder):
            return self.decoder.plain_rate()
        return 1 / self._plain_seconds

    @functools.cached_property
    def _plain_seconds(self) -> float:
        """Of a step of plain decoding by the target, without the network."""
        verifier = self.decoder.verifier
        if isinstance(verifier, RemoteVerifier):
            return verifier.plain().plain_seconds()
        return plain_seconds(self.target, verifier.device, self.decoder.local.target.dtype)

    @property
    def pace(self) -> float:
        """Tokens per second that a second costs: given, or the speed of the pair's best static setting."""
        return self.given_pace if self.given_pace is not None else self.plain_rate * self.best_static

    def _check_lengths(self) -> None:
        """Refuse prompts that would not fit when their turn comes; those of a log of conversations are left out."""
        context = self.decoder.context
        room = context - self.max_new_tokens - self.control.max_depth - 1
        if room < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; the context is {context} tokens in all")
        long = [prompt for prompt, ids in self.encoded.items() if prompt.logged and len(ids) > room]
        if long and len(long) < len(self.encoded):
            print(f"left out {len(long)} of {len(self.encoded)} prompts, longer than {room} tokens", file=sys.stderr)
            self.encoded = {prompt: ids for prompt, ids in self.encoded.items() if prompt not in long}
        longest = max(self.encoded, key=lambda prompt: len(self.encoded[prompt]))
        if (length := len(self.encoded[longest])) > room:
            raise ValueError(
                f"a prompt of {longest.task} has {length} tokens; with max_new_tokens {self.max_new_tokens} the "
                f"context of {context} has room for {room}: choose other prompts or lower max_new_tokens"
            )

    def _begin_text(self, given: str | Prompt | None) -> None:
        if isinstance(given, str):
            given = Prompt("given", given)
        if given is not None and self.trace and given not in self.encoded:
            raise ValueError(f"{self.trace!r} has prompts of its own; another text cannot be given")
        if len(self.clocks) > 1:
            self.decoder.clock = self.clocks[self.np_random.integers(len(self.clocks))]
        for _ in range(100):  # a prompt whose first token is EOS is not used
            prompt = given or self._draw_prompt()
            ids = self.encoded.get(prompt) or encode_prompt(self.tokenizer, prompt, self.template, self.date)
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
        self._restarts_began = getattr(self.decoder, "restart_seconds", 0.0)

    def _draw_prompt(self) -> Prompt:
        """Any prompt, or with ``switch_every`` one of the set whose turn it is."""
        if not self.switch_every:
            return self.prompts[self.np_random.integers(len(self.prompts))]
        tasks = list(dict.fromkeys(prompt.task for prompt in self.prompts))
        if self.texts % self.switch_every == 0 and len(tasks) > 1:
            others = [task for task in tasks if task != self.turn]
            self.turn = others[self.np_random.integers(len(others))]
        ours = [prompt for prompt in self.prompts if prompt.task == (self.turn or tasks[0])]
        return ours[self.np_random.integers(len(ours))]

    def _info(self, cycle: Any, seconds: dict[str, float]) -> dict[str, Any]:
        emitted = cycle.emitted if cycle else 0
        spent = sum(seconds.values())
        info = {
            "emitted": emitted,
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
            if isinstance(self.decoder, LlamaServerDecoder):
                info["restart_seconds"] = self.decoder.restart_seconds - self._restarts_began
            worth = sum(
                self.control.worth(done) for done in self.decoder.cycles
            )  # without the first token, the prefill's
            info["speedup"] = worth / total / self.plain_rate
        return info


def keyword_types(kind: type[Control]) -> dict[str, Any]:
    """Annotations of the keywords that an environment of this control has."""
    hints = get_type_hints(SpecEnv.__init__) | get_type_hints(kind.__init__)
    return {name: hint for name, hint in hints.items() if name not in ("control", "own", "return")}


def check_keywords(kind: type[Control], given: dict[str, Any]) -> None:
    """Refuse a keyword that neither SpecEnv nor the control knows, naming the nearest one, and wrong types."""
    types = keyword_types(kind)
    for name, value in given.items():
        if name not in types:
            nearest = difflib.get_close_matches(name, types, n=1, cutoff=0.0)[0]
            raise TypeError(f"{kind.__name__} got an unexpected keyword argument {name!r}; did you mean {nearest!r}?")
        try:
            plain = value.item() if isinstance(value, np.generic) else value
            TypeAdapter(types[name]).validate_python(plain, strict=True)
        except ValidationError:
            raise TypeError(f"{name} is {value!r}; expected {inspect.formatannotation(types[name])}") from None
