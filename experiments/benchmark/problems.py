"""The problems of the benchmark, and its sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spec_envs.prompts.rows import Split
from spec_envs.settings import Keywords

PROBLEMS: dict[str, Keywords] = {  # keyword arguments; a name after the slash stands for other models
    "SpecDepth-v0": {},
    "SpecBudget-v0": {"depth": 2},
    "SpecTree-v0": {},
    "SpecK-v0": {"decision": "token"},
    "SpecK-v0/qwen2.5-coder-1.5b": {"decision": "token", "target": "qwen2.5-coder-1.5b", "k_max": 10},
}
LTD = "ltd-iterative-all"  # the stanza of SpecDepth-v0 that trains the policies of Learning to Draft, for trees
LEARNED = ("hindsight", "exact-pg", "ppo", LTD)
FOREIGN = ("qwen3-14b-a6000", "smollm2-135m-int8-xeon-amx-2")  # cost tables that no training has seen


@dataclass(frozen=True)
class Size:
    """The sizes of a benchmark."""

    texts: tuple[int, int, int]  # recorded for training and validation, and held out
    tokens: int  # most new tokens of a text
    seeds: int
    ltd_seeds: int  # most seeds of Learning to Draft, which trains for much longer than the others; 0 leaves it out
    steps: int  # environment steps of PPO on the trace; 0: those of its stanza
    ltd_steps: int  # the same for each of the policies of Learning to Draft
    tuning: int  # training texts that rules are tuned on
    prompts: int  # decoded live
    cycles: int  # with random actions, to compare live and replayed decoding
    sampled: int  # prompts decoded live at temperature 1
    held_out: Split = "test"  # of the texts that arms are scored on, replayed and live


FULL = Size((60, 12, 30), 96, 10, 3, 0, 0, 20, 40, 300, 10)
FAST = Size((4, 1, 3), 32, 2, 1, 32_768, 512, 3, 3, 40, 2)
LARGER = replace(FULL, tokens=64, prompts=30, cycles=120, sampled=5)  # for larger models, which take longer
FEW = (1, 3, 10, 30)  # numbers of training texts that hindsight is tried with
