"""The stream of user turns that an early exit learns from if none is given."""

from __future__ import annotations

import logging
import random
from pathlib import Path

from spec_envs.decoding.loading import DEFAULT_TARGET
from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer, resolve_device, resolve_dtype
from spec_envs.experiments.drafters.selftext import sampled_turns
from spec_envs.experiments.drafters.turns import composed_turn, shipped_prompts
from spec_envs.prompts.conversations import write_log
from spec_envs.settings import Keywords

LOG = logging.getLogger(__name__)

CONVERSATIONS = "conversations.jsonl"


def write_own_text(path: Path, env: Keywords, count: int, seed: int) -> None:
    """Write a log of ``count`` user turns: the shipped training prompts, turns that the target writes itself, and turns
    composed from its words and from Python standard-library sources.

    Raises:
        ValueError: the target completes no user turn.
    """
    name, device = env.get("target", DEFAULT_TARGET), resolve_device(env.get("device", "auto"))
    target = load_target(name, device, resolve_dtype(env.get("dtype", "auto"), device, [name]))
    tokenizer, rng = load_tokenizer(name), random.Random(seed)
    turns = [prompt.text for prompt in shipped_prompts() if not prompt.history][: count // 2]
    LOG.info(f"{name} writes user turns for training")
    barren = 0
    while len(turns) < count and barren < 3:
        written = sampled_turns(target, tokenizer, min(128, 2 * (count - len(turns))), 160, 0.4, rng)
        barren = 0 if written else barren + 1
        turns += [*written, *(composed_turn(rng, written) for _ in written)]
    if len(turns) < count:
        raise ValueError(f"{name} completes no user turn; give own_text=0 and conversations in env.prompts")
    rng.shuffle(turns)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_log(path, turns[:count], "train")
