"""The decoder and the prompts that an environment of given keyword arguments has, without Gymnasium."""

from __future__ import annotations

import itertools

from spec_envs import recordings
from spec_envs.controls import Control
from spec_envs.decoding.decoder import Decoder, over_models
from spec_envs.decoding.drafters.names import default_drafter
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.traces.recording import MAX_NEW_TOKENS
from spec_envs.decoding.weights.checkpoints import load_tokenizer, model_folder
from spec_envs.decoding.weights.config import load_config
from spec_envs.experiments.measure.arms import Encoded
from spec_envs.prompts.sets import encode_all, in_turn, load_prompts
from spec_envs.settings import Keywords, Settings

DRAFTED = 32  # rows of the context that are kept free for drafts after a text
MODELS = ("target", "drafter", "device", "dtype", "temperature", "top_p")


def decoder_for(env: Keywords, control: Control) -> Engine:
    """Return the decoder of an environment with these keyword arguments."""
    trace = env.get("trace")
    recording = recordings.load(trace) if trace is not None else None
    clock = recordings.clocks_for(env.get("clock", "wall"), env.get("device", "auto"), recording)[0]
    return control.open(clock, trace, **models_of(env, control))


def models_of(env: Keywords, control: Control) -> Keywords:
    """Return the keyword arguments that name the models and how they sample."""
    given = {name: env[name] for name in MODELS if name in env}
    return {"temperature": control.temperature} | given


def local_decoder(env: Keywords, control: Control) -> Decoder:
    """Return a decoder of the same models without a link and with a measured clock, to measure cost curves with."""
    if control.link:
        return load_decoder(**models_of(env, control), width=control.width, max_depth=control.max_depth)
    return over_models(decoder_for({**env, "clock": "wall"}, control))


def encoded_prompts(env: Keywords, split: str, count: int) -> list[Encoded]:
    """Return up to ``count`` prompts of a split.

    Tasks take turns, each with one prompt or with ``switch_every`` of them. Prompts of a log of conversations or a data
    set are left out if they are too long or if the chat template does not accept them.

    Raises:
        ValueError: no prompt is left.
    """
    if count < 1:
        raise ValueError(f"the number of prompts is {count}; expected 1 or more")
    settings = Settings.shared(env)
    if settings.trace:
        recorded = recordings.load(settings.trace).prompts(split, settings.prompts)
        return [Encoded(*prompt) for prompt in itertools.islice(itertools.cycle(recorded), count)]
    prompts, target = load_prompts(settings.prompts, split, settings.data_dir), settings.target
    tokenizer, context = load_tokenizer(target), Shape.from_config(load_config(model_folder(target))).context
    mixed = in_turn(prompts, max(1, settings.switch_every))
    encoded = encode_all(tokenizer, mixed, settings.template, settings.date)
    room = context - (settings.max_new_tokens or MAX_NEW_TOKENS) - DRAFTED
    fitting = (Encoded(p.task, ids) for p, ids in encoded if not p.logged or len(ids) <= room)
    if not (found := list(itertools.islice(fitting, count))):
        raise ValueError(
            f"every conversation in the split {split!r} is longer than {room} tokens, the room that the model has; "
            "give other prompts or lower max_new_tokens"
        )
    return found


def target_and_drafter(env: Keywords) -> tuple[str, str]:
    """Return the names of target and drafter of an environment with these keyword arguments."""
    settings = Settings.shared(env)
    drafter = default_drafter(settings.target) if settings.drafter == "auto" else settings.drafter
    return settings.target, drafter
