"""Small commands that ``chaos.py`` kills, and summaries of the files that each has to make."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file

PRICED = "env.clock=smollm2-135m-int8-xeon-amx-2"
SHORT = "env.prompts=gsm8k env.max_new_tokens=16 test_prompts=2"
TRAIN = "spec_envs.experiments.train --root {}"


class Case(NamedTuple):
    """A command, and a summary of its files.

    Attributes:
        arguments: module and arguments; ``{}`` stands for the folder.
        made: returns a summary of the files in a folder, which is the same however often the command was killed.
    """

    name: str
    arguments: str
    made: Callable[[Path], Mapping[str, object]]

    def command(self, folder: Path) -> list[str]:
        """Return the module and arguments of the command in that folder."""
        return [argument.replace("{}", str(folder)) for argument in self.arguments.split()]


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """Return the SHA-256 of the files that match patterns, by name."""
    found = {path for pattern in patterns for path in folder.rglob(pattern)}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def weights(folder: Path, pattern: str) -> dict[str, str]:
    """Return the SHA-256 of the tensors in safetensors files, by name; their metadata may have been timed."""
    found = {}
    for path in sorted(folder.rglob(pattern)):
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        found[str(path.relative_to(folder))] = digest.hexdigest()
    return found


def last_step(folder: Path) -> Mapping[str, object]:
    """Return the last step in a run's log, and the number of its tables."""
    log = next(folder.rglob("log.jsonl"))
    return {
        "steps": json.loads(log.read_text().splitlines()[-1])["timesteps"],
        "tables": len(list(folder.rglob("results.json"))),
    }


def learned_at_an_exit(folder: Path) -> Mapping[str, object]:
    """Return the digests of an exit's weights, and the number of lines in its log."""
    lines = sum(len(path.read_text().splitlines()) for path in folder.rglob("log.jsonl"))
    return weights(folder, "exit_proj/*.safetensors") | {"lines": lines}


def reported(folder: Path) -> Mapping[str, object]:
    """Return epochs and vocabulary of a drafter's report, and the names of its weights."""
    report = json.loads((folder / "eagle3" / "report.json").read_text())
    names = sorted(load_file(folder / "eagle3" / "model.safetensors"))
    return {"epochs": report["epochs"], "draft_vocab": report["draft_vocab"], "names": names}


def benchmarked(folder: Path) -> Mapping[str, object]:
    """Return the digests of the recordings, and the names of the arms that have figures."""
    results = json.loads(next(folder.rglob("adaptive-control-fast.json")).read_text())
    arms = {name: sorted(found["replay"]) for name, found in results["problems"].items()}
    return digests(folder, "traces/**/*.npy") | {"arms": arms}


PROFILE = "env.trace=qwen2.5-coder-32b-cpu"
EXPECTED = "env.trace=smollm2-135m-topk eval_env.trace=smollm2-135m-topk"
ROLLOUTS = "hyperparameters.n_steps=64 hyperparameters.batch_size=32 checkpoint_freq=64"
REPLAY = "hyperparameters.learning_starts=64 hyperparameters.batch_size=32 hyperparameters.buffer_size=2000"

CASES = {  # the fastest first
    case.name: case
    for case in (
        Case(
            "tune",
            f"spec_envs.experiments.tune SpecK-v0 --agent svip --root {{}} --trials 30 --set {PROFILE} "
            "env.decision=token",
            lambda folder: digests(folder, "best.yml"),
        ),
        Case(
            "train-ppo",
            f"{TRAIN} SpecK-v0 --agent ppo-live --set {PROFILE} {ROLLOUTS} total_timesteps=1024 eval_freq=512 "
            "test_prompts=3",
            last_step,
        ),
        Case(
            "train-ddqn",
            f"{TRAIN} SpecTopK-v0 --agent ddqn-k --set {EXPECTED} {REPLAY} total_timesteps=1024 eval_freq=256 "
            "checkpoint_freq=64 test_prompts=3",
            last_step,
        ),
        Case(
            "topk-trace",
            "spec_envs.experiments.traces.record_expected --scale 0.02 --max-new-tokens 16 --out {}/trace.npz",
            lambda folder: digests(folder, "*.npz"),
        ),
        Case(
            "trace",
            "spec_envs.experiments.traces.record SpecDepth-v0 --texts 3 1 1 --max-new-tokens 16 --depth 3 "
            "--prompts gsm8k --out {}",
            lambda folder: digests(folder, "*.npy"),
        ),
        Case(
            "train-hindsight",
            f"{TRAIN} SpecK-v0 --agent hindsight --set {PRICED} {SHORT} eval_prompts=1 record=[3,1,1]",
            lambda folder: digests(folder, "traces/**/*.npy") | weights(folder, "hindsight-0/policy.safetensors"),
        ),
        Case(
            "dvi",
            "spec_envs.experiments.dvi --agent dvi --own_text 8 --fast_batch 8 --replay_batch 8 --root {} "
            f"--results {{}}/results --set {SHORT} eval_freq=0 checkpoint_freq=16",
            learned_at_an_exit,
        ),
        Case(
            "drafter",
            "spec_envs.experiments.drafters --tokens 300 --epochs 2 --draft-vocab 256 --batch-tokens 512 --work {}",
            reported,
        ),
        Case(
            "benchmark",
            "spec_envs.experiments.benchmark --fast --envs SpecBudget-v0 --seeds 1 --count 2 --root {} --out {}",
            benchmarked,
        ),
    )
}
