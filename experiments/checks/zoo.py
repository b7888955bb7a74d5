"""Check that the whole zoo works (`spec-envs check zoo`): every stanza of every YAML file is trained for a few steps on
the real model and measured, and every shipped agent is loaded and run.

Agents learn nothing useful in so few steps; what is checked is that they are trained, saved, loaded and measured. If
the process is killed, the same command continues with the cases that have not passed yet, as long as the code is the
same. Prints a table and exits with 1 if anything failed; what a stanza printed is in STANZA.log beside its run folder.
With --priced, all 87 stanzas take 15 minutes of processor time, and a sample of four about one minute.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from spec_envs import ENVIRONMENTS, agents, generate
from spec_envs.arguments import POSITIVE, SEED, Parser, output_folder
from spec_envs.controls import Control
from spec_envs.decoding.loading import DEFAULT_TARGET, load_decoder
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import Experiment, load_experiment
from spec_envs.experiments.measure.machine import revision
from spec_envs.experiments.runs import run_folder
from spec_envs.experiments.stanzas import ExperimentFile
from spec_envs.experiments.train import run, run_stages
from spec_envs.experiments.work_folder import NOTE
from spec_envs.files import held, read_json, write_json
from spec_envs.prompts.sets import encode

LOG = logging.getLogger(__name__)

SHIPPED = "shipped"
PASSED = "passed.json"
SMALL: dict[str, int] = {  # largest values in a stanza
    "total_timesteps": 64,
    "eval_freq": 32,
    "eval_prompts": 1,
    "test_prompts": 2,
    "checkpoint_freq": 32,
    "own_text": 8,
}
SMALLER: dict[str, int] = {  # largest values among its hyper-parameters
    "n_steps": 32,
    "batch_size": 16,
    "n_epochs": 1,
    "buffer_size": 200,
    "learning_starts": 8,
    "target_update_interval": 16,
    "fast_batch": 8,
    "replay_batch": 8,
    "kl_steps": 2,
    "anneal_steps": 2,
    "warmup_timesteps": 8,
}
RECORDED = [2, 1, 1]
TOKENS = 8  # most new tokens per text
PROMPTS = "gsm8k"  # short prompts
CLOCK = "smollm2-135m-int8-xeon-amx-2"


class Case(NamedTuple):
    """A stanza of an environment, or, under the name ``SHIPPED``, its shipped agent."""

    env_id: str
    stanza: str


class Row(NamedTuple):
    """The outcome of a case: its seconds, and why it failed (empty if it passed)."""

    case: Case
    seconds: float
    failed: str


def cases() -> list[Case]:
    """Return all cases."""
    trained = [Case(env_id, stanza) for env_id in ENVIRONMENTS for stanza in ExperimentFile.of(env_id).stanzas]
    return trained + [Case(path.name, SHIPPED) for path in sorted(agents.SHIPPED.iterdir())]


def sampled(found: list[Case], count: int, seed: int) -> list[Case]:
    """Return ``count`` stanzas, of as many environments as possible, and every shipped agent."""
    rng, by_env = random.Random(seed), dict[str, list[Case]]()
    for case in found:
        if case.stanza != SHIPPED:
            by_env.setdefault(case.env_id, []).append(case)
    turns = [rng.sample(of_one, len(of_one)) for of_one in rng.sample(list(by_env.values()), len(by_env))]
    mixed = [turn[i] for i in range(max(map(len, turns))) for turn in turns if i < len(turn)]
    return mixed[:count] + [case for case in found if case.stanza == SHIPPED]


class Options(NamedTuple):
    """The options of the command.

    Attributes:
        larger: run stanzas for larger models on these models instead of the default one.
        priced: price forwards instead of timing them, and leave other software out.
    """

    larger: bool = False
    priced: bool = False


def shrunk(env_id: str, stanza: str, options: Options) -> Experiment:
    """Return a stanza with small numbers of steps, prompts and tokens."""
    full = load_experiment(env_id, stanza)
    overrides = [f"{key}={min(value, getattr(full, key))}" for key, value in SMALL.items()]
    hyperparameters = {
        key: min(SMALLER[key], full.hyperparameters[key]) for key in SMALLER if key in full.hyperparameters
    }
    overrides += [f"hyperparameters.{key}={value}" for key, value in hyperparameters.items()]
    if full.record:
        overrides.append(f"record={RECORDED}")
    overrides.append(f"env.max_new_tokens={TOKENS + full.env.get('adjustment_interval', 0)}")
    if not full.env.get("trace"):
        overrides.append(f"env.prompts={PROMPTS}")
    if options.priced and not full.env.get("clock"):
        overrides.append(f"env.clock={CLOCK}")
    if "target" in full.env and not options.larger:
        overrides.append(f"env.target={DEFAULT_TARGET}")
    return load_experiment(env_id, stanza, overrides)


def train_in_small(case: Case, root: Path, options: Options) -> None:
    """Train and evaluate a small stanza. What it prints is written into a file."""
    experiment, folder = shrunk(*case, options), run_folder(root, *case, seed=0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{case.stanza}.log"
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if experiment.stages:
            run_stages(experiment, case.stanza, 0, folder)
        else:
            run(experiment, case.env_id, case.stanza, 0, folder)
    found = list(folder.rglob("results.json"))
    if len(found) != max(1, len(experiment.stages)):
        raise ValueError(f"{folder} has {len(found)} tables; expected {max(1, len(experiment.stages))}")


def run_shipped(env_id: str) -> None:
    """Decode a text under a shipped agent, and check that it is the target's own text."""
    control, agent = agents.load(env_id)
    decoded, plain = (answer(control, chosen) for chosen in (agent, None))
    if decoded != plain:
        raise ValueError(f"the text under the agent of {env_id} differs from the target's own text")


def answer(control: Control, agent: Any) -> list[int]:
    """Return the token ids of the answer to one prompt, under an agent or by plain decoding."""
    decoder = load_decoder(width=control.width, max_depth=control.max_depth)
    prompt = encode(load_tokenizer(DEFAULT_TARGET), "Write a Python function that reverses a list.")
    if agent is None:
        return generate(decoder.plain(), None, None, prompt, 32).run().tokens
    return generate(decoder, control, agent, prompt, 32, task="humaneval").run().tokens


def check(case: Case, root: Path, options: Options) -> Row:
    """Return the outcome of one case; any error is the reason of its failure."""
    begin, failed = time.monotonic(), ""
    try:
        if case.stanza == SHIPPED:
            run_shipped(case.env_id)
        else:
            train_in_small(case, root, options)
    except Exception as error:  # any error, because errors are what the check looks for
        failed = f"{type(error).__name__}: {error}".splitlines()[0]
        (root / f"{case.env_id}-{case.stanza}-failed.txt").write_text(traceback.format_exc())
    return Row(case, time.monotonic() - begin, failed)


def check_all(chosen: list[Case], root: Path, options: Options, checked: Callable[[Case], Row]) -> list[Row]:
    """Return the outcomes of all cases. Cases that passed in this folder with the same code are not run again."""
    settings = {"revision": revision(), **options._asdict()}
    note = root / NOTE
    if note.exists() and read_json(note, f"delete {root}") != settings:
        LOG.info(f"{root} was made by another revision: starting again")
        for env_id in ENVIRONMENTS:
            shutil.rmtree(root / env_id, ignore_errors=True)
        (root / PASSED).unlink(missing_ok=True)
    write_json(note, settings)
    passed: dict[str, float] = read_json(root / PASSED, f"delete {root}") if (root / PASSED).exists() else {}
    rows = []
    with tqdm(chosen, desc="checking", unit="case") as bar:
        for case in bar:
            name = "/".join(case)
            bar.set_postfix_str(name)
            row = Row(case, passed[name], "") if name in passed else checked(case)
            if row.failed:
                bar.write(f"{name}: {row.failed}", file=sys.stderr)
            else:
                passed[name] = row.seconds
                write_json(root / PASSED, passed)
            rows.append(row)
    (root / PASSED).unlink()
    return rows


def table(rows: list[Row]) -> str:
    """Return the table of all outcomes, and their sum."""
    lines = ["| environment | stanza | seconds | |", "|---|---|---|---|"]
    lines += [f"| {row.case.env_id} | {row.case.stanza} | {row.seconds:.0f} | {row.failed or 'ok'} |" for row in rows]
    passed = sum(not row.failed for row in rows)
    return "\n".join([*lines, f"\n{passed} of {len(rows)} passed in {sum(row.seconds for row in rows):.0f} s"])


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--sample", type=POSITIVE, help="run only so many stanzas, of as many environments as possible")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the sample (default 0)")
    parser.add_argument("--larger", action="store_true", help="run stanzas for larger models on these models (1.6 GB)")
    parser.add_argument(
        "--priced",
        action="store_true",
        help=f"price forwards with the table {CLOCK} instead of timing them, and leave other software out (takes half "
        "the time)",
    )
    parser.add_argument(
        "--root", type=output_folder, default=Path("runs/zoo-check"), help="folder of the runs (default runs/zoo-check)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command continues with what has not passed yet"):
        options = Options(args.larger, args.priced)
        chosen = sampled(cases(), args.sample, args.seed) if args.sample else cases()
        with held(args.root):
            rows = check_all(chosen, args.root, options, lambda case: check(case, args.root, options))
        print(table(rows))
    if any(row.failed for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
