"""Checks before a training, so that a run does not fail only after it."""

from __future__ import annotations

from pathlib import Path

from spec_envs.agents import AGENTS, load, read_config
from spec_envs.controls import make_control
from spec_envs.env import SpecEnv
from spec_envs.experiments.exits.evaluation import K_MAX, exit_decoder
from spec_envs.experiments.measure.live import encoded_prompts, target_and_drafter
from spec_envs.experiments.measure.static import PROMPTS
from spec_envs.experiments.runs import RunConfig

UNUSED = ("cost_features", "split", "render_mode", "policy_seconds")  # keywords that have no effect in an evaluation


def check_evaluation(config: RunConfig) -> None:
    """Refuse a run whose validation or final table could not be made, because a split has no prompts, texts are too
    short, or a model, a cost table or a trace does not exist.

    Raises:
        ValueError: the message names the reason.
    """
    env = config.table_env
    at_exit = make_control(config.id, config.env).exit is not None
    used = {name: value for name, value in env.items() if name not in UNUSED}
    try:
        SpecEnv(config.id, split="test", **used).close()
        needed = {"test": (config.test_prompts, env), "train": (PROMPTS, env if at_exit else config.env)}
        if config.eval_freq:
            validated = env if AGENTS[config.agent].validated_by == "acceptance" else config.env
            needed["validation"] = (config.eval_prompts, validated)
        for split, (count, where) in needed.items():
            if not encoded_prompts(where, split, count):
                raise ValueError(f"there are no prompts in the split {split!r}")
        if at_exit:
            exit_decoder(env, K_MAX).close()
    except (ValueError, TypeError) as error:
        raise ValueError(f"nothing was trained, because the run could not be evaluated: {error}") from None


def check_partner(config: RunConfig) -> None:
    """Refuse a partner that cannot be loaded, or that was trained with other models.

    Raises:
        ValueError: the message names the partner.
    """
    if not config.partner:
        return
    partner = read_config(Path(config.partner))
    if target_and_drafter(partner["env"]) != target_and_drafter(config.env):
        raise ValueError(f"the partner {config.partner} was trained with another target or drafter")
    load(config.partner)
