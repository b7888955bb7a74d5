"""Compare agents that train an early exit (`spec-envs bench exits`): every stanza and seed reads the same stream of
prompts once, and the trained exits are then measured side by side on held-out prompts.

The run folders are `ROOT/SpecDVI-v0/<stanza>-<seed>/`. If the process is killed, the same command continues. Writes
exits.json, exits.md and exits.png, with the learning curves, into --out.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from spec_envs import agents
from spec_envs.arguments import POSITIVE, PROMPTS, SEED, Parser, input_file, output_folder
from spec_envs.controls.dvi import exit_of
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.exits.evaluation import Acceptance, drift, exit_decoder
from spec_envs.experiments.exits.runs import write_own_text
from spec_envs.experiments.measure.arms import Arm, decoded, run_arms
from spec_envs.experiments.measure.encoding import Inline
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.measure.machine import Machine, machine
from spec_envs.experiments.measure.results import Drift
from spec_envs.experiments.measure.static import static_chain
from spec_envs.experiments.reports.figures import drawn
from spec_envs.experiments.reports.pages import Page, add_page_arguments, counted, definitions, table
from spec_envs.experiments.runs import run_folder
from spec_envs.experiments.train import trained
from spec_envs.experiments.validation import VALIDATED_K

LOG = logging.getLogger(__name__)

ENV = "SpecDVI-v0"
STANZAS = ("reinforce", "reinforce-head", "dvi")
UNTRAINED = "untrained"


@dataclass(kw_only=True)
class Learned:
    """A trained exit: its acceptance on held-out prompts, and the validations during its training (``curve``)."""

    acceptance: Annotated[Acceptance, Inline()]
    drift: Annotated[Drift, Inline()]
    seed: int
    curve: list[dict[str, float]]

    @property
    def accepted_per_cycle(self) -> float:
        return self.acceptance.emitted_per_cycle - 1


@dataclass(kw_only=True)
class Exits:
    """The untrained exit and the trained exits of each stanza, measured side by side with ``k`` drafted tokens per
    cycle."""

    machine: Machine
    prompts: int
    k: int
    untrained: Acceptance
    stanzas: dict[str, list[Learned]]


def train_all(args: argparse.Namespace, stream: Path) -> dict[str, list[Path]]:
    """Train the runs that are not trained yet, and return the run folders by stanza."""
    runs: dict[str, list[Path]] = {}
    for seed in args.seeds:  # all stanzas take turns before the next seed
        for stanza in args.stanzas:
            settings = [f"env.prompts={stream}", "env.split=all", "eval_env.prompts=all", "own_text=0"]
            settings += [f"hyperparameters.texts={args.texts}", f"eval_freq={args.eval_freq}", *args.set]
            folder = run_folder(args.root, ENV, stanza, seed)
            LOG.info(f"{stanza}, seed {seed}")
            trained(load_experiment(ENV, stanza, settings), ENV, stanza, seed, folder)
            runs.setdefault(stanza, []).append(folder)
    return runs


def compare(runs: dict[str, list[Path]], count: int, k: int) -> Exits:
    """Measure the exit of every run and the untrained exit side by side on held-out prompts."""
    first = next(iter(runs.values()))[0]
    env = agents.read_config(first)["env"] | {"prompts": "all"}
    decoders = {UNTRAINED: exit_decoder(env, k)}
    for folders in runs.values():
        for folder in folders:
            decoders[str(folder)] = exit_decoder(agents.read_config(folder)["env"], k, str(folder))
    plain = decoders[UNTRAINED].plain()
    arms: dict[str, Arm] = {"plain": decoded(plain, None)}
    arms |= {name: decoded(decoder, static_chain(k, k)) for name, decoder in decoders.items()}
    samples = run_arms(arms, encoded_prompts(env, "test", count), env.get("max_new_tokens", 128), "held-out prompts")

    def learned(folder: Path) -> Learned:
        name = str(folder)
        return Learned(
            acceptance=Acceptance.of(samples[name]),
            drift=drift(exit_of(decoders[name]), samples["plain"]),
            seed=agents.read_config(folder)["seed"],
            curve=[json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()],
        )

    return Exits(
        machine=machine(decoders[UNTRAINED]),
        prompts=len(samples["plain"]),
        k=k,
        untrained=Acceptance.of(samples[UNTRAINED]),
        stanzas={stanza: [learned(folder) for folder in folders] for stanza, folders in runs.items()},
    )


def body(found: Exits) -> Iterable[str]:
    """Yield the lines of the page below its picture: the untrained exit, and each stanza's trained exits as mean and
    range over seeds."""
    before, length = found.untrained, found.untrained.emitted_per_cycle - 1
    rows = [[UNTRAINED, f"{before.accept_rate:.3f}", f"{length:.3f}", "1", "0", "0"]]
    for stanza, exits in found.stanzas.items():
        lengths = [row.accepted_per_cycle for row in exits]
        rows.append(
            [
                stanza,
                spread([row.acceptance.accept_rate for row in exits]),
                spread(lengths),
                f"{statistics.fmean(lengths) / length:.2f}" if length else "–",
                f"{statistics.fmean(row.curve[-1]['tokens'] for row in exits):.0f}",
                f"{statistics.fmean(row.drift.drift for row in exits):.4f}",
            ]
        )
    head = ["exit", "accepted of verified", "accepted per cycle", "over untrained", "tokens read", "drift (nats)"]
    yield from table(head, rows)
    seeds = len(next(iter(found.stanzas.values())))
    yield ""
    yield (
        f"- {found.prompts} held-out prompts, {found.k} drafted tokens per cycle, greedy; mean [smallest, largest] over "
        f"{counted(seeds, 'seed')}. Counts of tokens have no noise of the clock, so there is no A/A check."
    )
    yield "- *Tokens read* are decoded and learned from during training, once."
    yield (
        "- *Drift* is the mean KL divergence, per token, of the verifier that training leaves from the original target. "
        "Where it is 0, the verifier is the target, and the text is [lossless](../concepts/lossless.md)."
    )
    yield ""
    own = {
        UNTRAINED: "the [early exit](../guides/early-exits.md) before training: the target's own output projection "
        "after its first layers."
    }
    yield from definitions([UNTRAINED, *found.stanzas], own | {name: trained_by(name) for name in found.stanzas})


def trained_by(stanza: str) -> str:
    """Return what a stanza's arm is."""
    return f"the exit that the stanza `{stanza}` trains ([agents at an early exit](../agents/exits.md))."


def spread(values: Sequence[float]) -> str:
    """Return the mean of values, with the smallest and the largest in brackets."""
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def draw(found: Exits, path: Path) -> None:
    """Draw acceptance on validation prompts over the tokens that were read: a line per seed, and one for their mean."""
    with drawn(path, 11, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        for i, (stanza, rows) in enumerate(found.stanzas.items()):
            curves, moved = [row.curve for row in rows], statistics.fmean(row.drift.drift for row in rows)
            points = list(zip(*curves, strict=False))  # validations of all seeds after about the same number of tokens
            label = stanza + (f", text drifts by {moved:.1f} nats" if moved else "")
            for axis, key in ((left, "accept_rate"), (right, "emitted_per_cycle")):
                for one in curves:
                    shown = [p["tokens"] for p in one], [p[key] for p in one]
                    axis.plot(*shown, color=f"C{i}", alpha=0.25, linewidth=0.8)
                mean = [[statistics.fmean(p[name] for p in point) for point in points] for name in ("tokens", key)]
                axis.plot(*mean, color=f"C{i}", marker=".", label=label)
        for axis, label in ((left, "accepted of verified drafts"), (right, "emitted tokens per cycle")):
            axis.set_xlabel("tokens decoded and learned from")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        left.legend()
        figure.suptitle(f"validation prompts, {VALIDATED_K} drafted tokens per cycle", fontsize=10)


PAGE = Page(
    kind=Exits,
    command="bench exits",
    title="Early exits",
    purpose="Agents that train an early exit while it decodes all read the same stream of prompts once, to show how "
    "much more of its drafts the target then accepts, and whether the target itself stays what it was.",
    caption="Acceptance on validation prompts over the tokens that were read, by agent and seed",
    body=body,
    machines=lambda found: [found.machine],
    draw=draw,
)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--stanzas",
        nargs="+",
        default=list(STANZAS),
        help=f"stanzas of experiments/{ENV}.yml (default {' '.join(STANZAS)})",
    )
    parser.add_argument("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="seeds, one run each (default 0 1 2)")
    parser.add_argument(
        "--texts", type=POSITIVE, default=300, help="number of prompts that each run reads (default 300)"
    )
    parser.add_argument(
        "--conversations", type=input_file, help="log of conversations to read (default: the target writes user turns)"
    )
    parser.add_argument(
        "--eval-freq",
        type=POSITIVE,
        default=3000,
        help="drafted tokens between the validations that make up a curve (default 3000)",
    )
    parser.add_argument("--count", type=PROMPTS, default=30, help="number of held-out prompts (default 30)")
    parser.add_argument(
        "--k", type=POSITIVE, default=VALIDATED_K, help=f"drafted tokens per cycle in the table (default {VALIDATED_K})"
    )
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="override keys of every stanza"
    )
    parser.add_argument(
        "--root",
        type=output_folder,
        default=Path("runs/bench-dvi"),
        help="folder of the runs and of the stream (default runs/bench-dvi)",
    )
    add_page_arguments(parser)
    return parser.parse_args()


def measured(args: argparse.Namespace) -> Exits:
    """Train what is not trained yet, and measure."""
    stream = args.conversations or args.root / "conversations.jsonl"
    if args.conversations is None and not stream.exists():
        own = [s.removeprefix("env.") for s in args.set if s.startswith("env.target=")]
        write_own_text(stream, dict(setting.split("=", 1) for setting in own), args.texts, seed=0)
    return compare(train_all(args, stream.resolve()), args.count, args.k)


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command continues from the last checkpoint, if one was written yet"):
        PAGE.publish(args, lambda: measured(args), "exits")


if __name__ == "__main__":
    main()
