"""The prompts of an environment: which there are, and whose turn it is."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.prompts.sets import Prompt, encode_all, encode_prompt, load_prompts

if TYPE_CHECKING:
    from spec_envs.decoding.traces.recording import Recording
    from spec_envs.settings import Settings

LOG = logging.getLogger(__name__)


class PromptStream(Sequence[Prompt]):
    """The prompts that an environment draws its texts from; one that is listed twice is drawn twice as often.

    Args:
        settings: the environment's settings; they name the prompts.
        recording: the recording whose prompts they are, or None.

    Attributes:
        encoded: token ids by prompt.
        texts: number of texts drawn since the last ``restart``.
        turn: with ``switch_every``, the prompt set whose turn it is.
    """

    def __init__(self, settings: Settings, recording: Recording | None):
        self.settings, self.recording = settings, recording
        self.texts, self.turn = 0, ""
        if recording:
            recorded = recording.prompts(settings.split, settings.prompts)
            self.encoded = {Prompt(task, str(i)): ids for i, (task, ids) in enumerate(recorded)}
            self.listed = list(self.encoded)
        else:
            listed = load_prompts(settings.prompts, settings.split, settings.data_dir)
            self.encoded = dict(encode_all(self.tokenizer, listed, settings.template, settings.date))
            self.listed = [prompt for prompt in listed if prompt in self.encoded]

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The target's tokenizer."""
        return load_tokenizer(self.settings.target)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        return self.listed[index]

    def __len__(self) -> int:
        return len(self.listed)

    def fit(self, context: int, max_new_tokens: int, max_depth: int) -> None:
        """Leave out logged prompts that are too long for the context, and refuse others, before their turn comes.

        Raises:
            ValueError: the context has no room for any prompt, or for one that is not logged.
        """
        room = context - max_new_tokens - max_depth - 1
        if room < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; the context is {context} tokens in all")
        long = {prompt for prompt, ids in self.encoded.items() if prompt.logged and len(ids) > room}
        if long and len(long) < len(self.encoded):
            LOG.warning("left out %d of %d prompts, longer than %d tokens", len(long), len(self.encoded), room)
            self.encoded = {prompt: ids for prompt, ids in self.encoded.items() if prompt not in long}
            self.listed = [prompt for prompt in self.listed if prompt not in long]
        longest = max(self.encoded, key=lambda prompt: len(self.encoded[prompt]))
        if (length := len(self.encoded[longest])) > room:
            raise ValueError(
                f"a prompt of {longest.task} has {length} tokens; with max_new_tokens {max_new_tokens} the "
                f"context of {context} has room for {room}: choose other prompts or lower max_new_tokens"
            )

    def restart(self) -> None:
        """Begin again with the turn of the first prompt set."""
        self.texts, self.turn = 0, ""

    def draw(self, rng: np.random.Generator) -> Prompt:
        """Return any prompt, or with ``switch_every`` one of the set whose turn it is."""
        if not self.settings.switch_every:
            return self.listed[rng.integers(len(self.listed))]
        tasks = list(dict.fromkeys(prompt.task for prompt in self.listed))
        if self.texts % self.settings.switch_every == 0 and len(tasks) > 1:
            others = [task for task in tasks if task != self.turn]
            self.turn = others[rng.integers(len(others))]
        ours = [prompt for prompt in self.listed if prompt.task == (self.turn or tasks[0])]
        return ours[rng.integers(len(ours))]

    def ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, which may be one that is not in the stream.

        Raises:
            ValueError: a recording does not have the prompt.
        """
        if prompt in self.encoded:
            return self.encoded[prompt]
        if self.recording:
            raise ValueError(f"{self.settings.trace!r} has prompts of its own; another text cannot be given")
        return encode_prompt(self.tokenizer, prompt, self.settings.template, self.settings.date)


def given_prompt(options: dict[str, Any] | None) -> Prompt | None:
    """Return the prompt that options of ``reset`` give, or None if they give none.

    Raises:
        ValueError: another option, or a prompt of another type.
    """
    known = options is None or (isinstance(options, dict) and not set(options) - {"prompt"})
    given = options.get("prompt") if known and options else None
    if not known or not isinstance(given, (str, Prompt, type(None))):
        raise ValueError(f"options is {options!r}; expected {{'prompt': a text or a Prompt}}")
    return Prompt("given", given) if isinstance(given, str) else given
