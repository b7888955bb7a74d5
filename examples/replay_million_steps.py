"""A million steps of SpecK-v0 in seconds: a recorded trace is replayed in thousands of environments at once.

    python replay_million_steps.py              # records a small trace of the default model first
    python replay_million_steps.py FOLDER       # a trace that `spec-envs trace SpecK-v0` recorded

Each environment always drafts the same number of tokens, so the steps tell how fast every fixed length is on these texts.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

import spec_envs  # noqa: F401 - registers the environments

SMALL = ("--texts", "4", "1", "1", "--max-new-tokens", "48")


def recorded(folder: Path) -> Path:
    """Record a small trace into a folder; the command continues what an earlier one left."""
    command = [sys.executable, "-m", "spec_envs", "trace", "SpecK-v0", *SMALL, "--out", str(folder)]
    subprocess.run(command, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path, help="folder of a trace (default: record a small one)")
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of all environments together")
    parser.add_argument("--envs", type=int, default=4096, help="environments side by side")
    args = parser.parse_args()

    trace = args.trace or recorded(Path("runs/traces/example"))
    env = gym.make_vec("SpecK-v0", num_envs=args.envs, trace=str(trace))
    choices = int(env.single_action_space.n)
    lengths = np.arange(args.envs) % choices  # what each environment always does
    texts, speedups = np.zeros(choices, int), np.zeros(choices)  # by length: how many, and their sum
    env.reset(seed=0)
    rounds, began = -(-args.steps // args.envs), time.perf_counter()
    for _ in range(rounds):
        *_, infos = env.step(lengths)
        if "final_info" in infos:  # of the texts that ended in this step
            ended = np.flatnonzero(infos["_final_info"])
            texts += np.bincount(lengths[ended], minlength=choices)
            speedups += np.bincount(lengths[ended], infos["final_info"]["speedup"][ended], choices)
    seconds = time.perf_counter() - began

    for length in np.flatnonzero(texts):
        speed = speedups[length] / texts[length]
        print(f"draft {length:2d} tokens: {speed:.2f} times plain decoding  ({texts[length]} texts)")
    print(f"{rounds * args.envs:,} steps in {seconds:.1f} s: {rounds * args.envs / seconds:,.0f} steps per second")


if __name__ == "__main__":
    main()
