"""Train an early exit and measure it: a stanza of experiments/SpecDVI-v0.yml, set by flags.

    spec-envs dvi --model_name smollm2-135m --exit_layer 2 --fast_batch 64 --slow_every 8 --beta_kl 0.1
        --baseline_momentum 0.9

trains the run unless it is trained already, evaluates it on held-out prompts and writes RESULTS/<stanza>-<seed>.json. A
flag that is left out has the stanza's value; its help below names the key that it sets.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from spec_envs.arguments import (
    POSITIVE,
    PROMPTS,
    SEED,
    TEMPERATURE,
    TOKENS,
    Parser,
    input_file,
    nonempty,
    number,
    output_folder,
    whole_number,
)
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.evaluate import evaluate_run, save
from spec_envs.experiments.measure.encoding import Inline, to_json
from spec_envs.experiments.measure.machine import Machine
from spec_envs.experiments.measure.results import Exit
from spec_envs.experiments.runs import run_folder
from spec_envs.experiments.train import trained
from spec_envs.files import read_json, write_json

ENV = "SpecDVI-v0"
REINFORCE = ("slow_every", "beta_kl", "baseline_momentum")  # flags that the agent dvi does not have


class Flag(NamedTuple):
    """A flag's type, the key of the YAML that it sets, and its description."""

    kind: Callable[[str], Any]
    key: str
    help: str


FLAGS = {
    "model_name": Flag(nonempty, "env.target", "target: a name of models.yml, a hub id, a folder or a GGUF file"),
    "exit_layer": Flag(POSITIVE, "env.exit_layer", "number of layers before the exit"),
    "adapter": Flag(nonempty, "env.adapter", "trained part: head, kangaroo or layers"),
    "rank": Flag(POSITIVE, "env.rank", "rank of the low-rank weights"),
    "block": Flag(POSITIVE, "env.block", "drafted tokens that are verified together during training"),
    "draft_temperature": Flag(TEMPERATURE, "env.draft_temperature", "sampling temperature of drafts during training"),
    "max_new_tokens": Flag(TOKENS, "env.max_new_tokens", "most new tokens per prompt"),
    "switch_every": Flag(whole_number(0), "env.switch_every", "prompts after which the prompt set changes"),
    "dtype": Flag(nonempty, "env.dtype", "auto, int8, q4, bfloat16, float16 or float32"),
    "fast_batch": Flag(POSITIVE, "hyperparameters.fast_batch", "verified rows between updates"),
    "replay_batch": Flag(
        whole_number(0), "hyperparameters.replay_batch", "replayed rows that are added to those of an update"
    ),
    "slow_every": Flag(
        whole_number(0), "hyperparameters.slow_every", "updates between training steps of the verifier (reinforce)"
    ),
    "beta_kl": Flag(number(0), "hyperparameters.beta_kl", "weight of the KL to the frozen verifier (reinforce)"),
    "baseline_momentum": Flag(
        number(0, 1), "hyperparameters.baseline_momentum", "momentum of the moving baseline (reinforce)"
    ),
    "learning_rate": Flag(
        number(0, 1, above=True), "hyperparameters.learning_rate", "learning rate of the drafting part"
    ),
    "texts": Flag(POSITIVE, "hyperparameters.texts", "number of prompts to read (by default each one once)"),
    "own_text": Flag(whole_number(0), "own_text", "number of user turns that the target writes for training"),
    "test_prompts": Flag(PROMPTS, "test_prompts", "number of held-out prompts of the evaluation"),
}


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--agent",
        help=f"stanza of experiments/{ENV}.yml (default: reinforce if one of its flags is given, else dvi)",
    )
    for name, flag in FLAGS.items():
        parser.add_argument(f"--{name}", type=flag.kind, help=f"{flag.help} ({flag.key})")
    parser.add_argument(
        "--conversations",
        type=input_file,
        nargs="+",
        metavar="PATH",
        help="logs in ShareGPT's format, read one after another for training",
    )
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="further keys of the stanza"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of agent and environment (default 0)")
    parser.add_argument(
        "--root", type=output_folder, default=Path("runs"), help="where runs are written (default runs)"
    )
    parser.add_argument(
        "--results", type=output_folder, default=Path("results"), help="folder of the results (default results)"
    )
    return parser.parse_args()


def overrides(args: argparse.Namespace) -> list[str]:
    """Return the flags that were given, as overrides of the stanza's keys."""
    given = {flag.key: getattr(args, name) for name, flag in FLAGS.items() if getattr(args, name) is not None}
    found = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    if args.conversations:
        paths = ",".join(str(Path(path).resolve()) for path in args.conversations)
        found += [f"env.prompts={paths}", "env.split=all", "own_text=0", "hyperparameters.order=logged"]
        found += ["eval_env.prompts=all"]
    return [*found, *args.set]


@dataclass(frozen=True)
class Improvement:
    """The results of a run, as RESULTS/<stanza>-<seed>.json holds them."""

    agent: str
    seed: int
    run: str
    exit: Annotated[Exit | None, Inline()]
    machine: Machine


def improve(args: argparse.Namespace) -> None:
    """Train a run unless it is trained already, evaluate it, and write the results."""
    stanza = args.agent or ("reinforce" if any(getattr(args, name) is not None for name in REINFORCE) else "dvi")
    experiment = load_experiment(ENV, stanza, overrides(args))
    folder = run_folder(args.root, ENV, stanza, args.seed)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{stanza}-{args.seed}.json"
    refuse_other(path, folder)
    trained(experiment, ENV, stanza, args.seed, folder)
    results = evaluate_run(folder, {}, experiment.test_prompts)
    save(results, folder, shlex.join(["spec-envs", "eval", str(folder)]), folder)
    found = Improvement(stanza, args.seed, str(folder), results.exit, results.machine)
    write_json(path, to_json(found))
    print(f"results: {path}")


def refuse_other(path: Path, folder: Path) -> None:
    """Refuse to overwrite the results of another run, for example one with the same seed under another root."""
    if not path.exists():
        return
    found = read_json(path, "delete it, or choose another --results")
    other = found.get("run") if isinstance(found, dict) else None
    if not isinstance(other, str) or Path(other).resolve() != folder.resolve():
        raise ValueError(f"{path} holds the results of another run, {other}; choose another --results, or delete it")


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command continues from the last checkpoint, if one was written yet"):
        improve(args)


if __name__ == "__main__":
    main()
