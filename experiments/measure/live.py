"""What an environment's settings mean outside of Gymnasium: its decoder and its prompts."""

from __future__ import annotations

import itertools
from typing import Any

from spec_envs import recordings
from spec_envs.controls import Control
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.loading import DEFAULT_TARGET, default_drafter, load_decoder
from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.weights.checkpoints import load_tokenizer, model_folder
from spec_envs.decoding.weights.config import load_config
from spec_envs.experiments.measure.arms import Encoded
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.prompts.sets import encode_all, in_turn, load_prompts

DRAFTED = 32  # rows behind a text that its drafts may take up
MODELS = ("target", "drafter", "device", "dtype", "temperature", "top_p")


def decoder_for(env: dict[str, Any], control: Control) -> Decoder:
    """The decoder that an environment with these keyword arguments has."""
    trace = env.get("trace")
    recording = recordings.load(trace) if trace is not None else None
    clock = recordings.clocks_for(env.get("clock", "wall"), env.get("device", "auto"), recording)[0]
    return control.open(clock, trace, **models_of(env, control))


def models_of(env: dict[str, Any], control: Control) -> dict[str, Any]:
    """Those keyword arguments that say what decodes, and how it samples."""
    given = {name: env[name] for name in MODELS if name in env}
    return {"temperature": control.temperature} | given


def local_decoder(env: dict[str, Any], control: Control) -> Decoder:
    """The same pair without a link between, on a measured clock: what cost curves are measured on."""
    decoder = decoder_for({**env, "clock": "wall"}, control)
    if isinstance(decoder.verifier, RemoteVerifier):
        return load_decoder(**models_of(env, control), width=control.width, max_depth=control.max_depth)
    return decoder


def encoded_prompts(env: dict[str, Any], split: str, count: int) -> list[Encoded]:
    """``count`` prompts of a split, taken from the tasks in turn: one each, or as many as ``switch_every`` says. Those of a
    log of conversations or a data set that are too long, or that the template does not take, are left out."""
    if count < 1:
        raise ValueError(f"the number of prompts is {count}; expected 1 or more")
    if env.get("trace"):
        recorded = recordings.load(env["trace"]).prompts(split, env.get("prompts", "all"))
        return [Encoded(*prompt) for prompt in itertools.islice(itertools.cycle(recorded), count)]
    prompts = load_prompts(env.get("prompts", "all"), split, env.get("data_dir"))
    target = env.get("target", DEFAULT_TARGET)
    tokenizer, context = load_tokenizer(target), Shape.from_config(load_config(model_folder(target))).context
    mixed = in_turn(prompts, max(1, env.get("switch_every", 0)))
    encoded = encode_all(tokenizer, mixed, env.get("template"), env.get("date"))
    room = context - env.get("max_new_tokens", 128) - DRAFTED
    fitting = (Encoded(p.task, ids) for p, ids in encoded if not p.logged or len(ids) <= room)
    if not (found := list(itertools.islice(fitting, count))):
        raise ValueError(
            f"every conversation in the split {split!r} is longer than {room} tokens, what the model has room for; give "
            "other prompts or lower max_new_tokens"
        )
    return found


def target_and_drafter(env: dict[str, Any]) -> tuple[str, str]:
    """Target and drafter of an environment with these keyword arguments."""
    target = env.get("target", DEFAULT_TARGET)
    drafter = env.get("drafter", "auto")
    return target, default_drafter(target) if drafter == "auto" else drafter
