"""Learning curves of agents that improve an early exit (`make bench-dvi`): every stanza and seed reads the same stream of
prompts once, and what its exit is worth is then measured on held-out prompts, side by side.

Runs lie in `ROOT/SpecDVI-v0/<stanza>-<seed>/`; killed, the same command goes on. Results: bench-dvi.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spec_envs import agents
from spec_envs.arguments import POSITIVE, PROMPTS, SEED, Parser, input_file, output_folder
from spec_envs.controls.dvi import exit_of
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.exits.evaluation import acceptance, drift, exit_decoder
from spec_envs.experiments.exits.runs import VALIDATED_K, write_own_text
from spec_envs.experiments.measure.arms import Arm, decoded, run_arms
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.measure.machine import machine
from spec_envs.experiments.measure.static import static_chain
from spec_envs.experiments.train import run_folder, trained
from spec_envs.files import whole, write_json

ENV = "SpecDVI-v0"
STANZAS = ("reinforce", "reinforce-head", "dvi")
UNTRAINED = "untrained"


def train_all(args: argparse.Namespace, stream: Path) -> dict[str, list[Path]]:
    """Run folders by stanza, trained as far as they were not."""
    runs: dict[str, list[Path]] = {}
    for seed in args.seeds:  # a round of all stanzas before the next seed
        for stanza in args.stanzas:
            settings = [f"env.prompts={stream}", "env.split=all", "eval_env.prompts=all", "own_text=0"]
            settings += [f"hyperparameters.texts={args.texts}", f"eval_freq={args.eval_freq}", *args.set]
            folder = run_folder(args.root, ENV, stanza, seed)
            print(f"{stanza}, seed {seed}")
            trained(load_experiment(ENV, stanza, settings), ENV, stanza, seed, folder)
            runs.setdefault(stanza, []).append(folder)
    return runs


def compare(runs: dict[str, list[Path]], count: int, k: int) -> dict[str, Any]:
    """Acceptance of every run's exit and of the untrained one on held-out prompts, all in one run."""
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
    found: dict[str, Any] = {
        "machine": machine(decoders[UNTRAINED]),
        "prompts": len(samples["plain"]),
        "k": k,
        UNTRAINED: acceptance(samples[UNTRAINED]),
        "stanzas": {},
    }
    for stanza, folders in runs.items():
        rows = []
        for folder in folders:
            name = str(folder)
            rows.append(
                acceptance(samples[name])
                | drift(exit_of(decoders[name]), samples["plain"])
                | {"seed": agents.read_config(folder)["seed"], "curve": curve(folder)}
            )
        found["stanzas"][stanza] = rows
    return found


def curve(folder: Path) -> list[dict[str, float]]:
    """What was validated while a run learned."""
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def markdown(found: dict[str, Any]) -> str:
    """The table: before and after, by stanza, as the mean and the range over seeds."""
    before = found[UNTRAINED]
    head = ["exit", "accepted of judged", "accepted per cycle", "over untrained", "tokens read", "drift (nats)"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    length = before["emitted_per_cycle"] - 1
    lines.append(f"| untrained | {before['accept_rate']:.3f} | {length:.3f} | 1 | 0 | 0 |")
    for stanza, rows in found["stanzas"].items():
        cells = [
            spread([row["accept_rate"] for row in rows]),
            spread([row["emitted_per_cycle"] - 1 for row in rows]),
            f"{statistics.fmean(row['emitted_per_cycle'] - 1 for row in rows) / length:.2f}",
            f"{statistics.fmean(row['curve'][-1]['tokens'] for row in rows):.0f}",
            f"{statistics.fmean(row['drift'] for row in rows):.4f}",
        ]
        lines.append(f"| {stanza} | {' | '.join(cells)} |")
    about = found["machine"]
    lines += [
        "",
        f"{found['prompts']} held-out prompts, {found['k']} drafted tokens per cycle, greedy; mean [least, most] over "
        f"{len(next(iter(found['stanzas'].values())))} seeds. {about['processor']}, {about['threads']} threads, "
        f"{about['dtype']}; revision {about['revision']}.",
    ]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Mean, least and most."""
    return f"{statistics.fmean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def draw(found: dict[str, Any], path: Path) -> None:
    """Acceptance on validation prompts over the tokens that were read, a line per seed and one for their mean."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, (stanza, rows) in enumerate(found["stanzas"].items()):
        curves, moved = [row["curve"] for row in rows], statistics.fmean(row["drift"] for row in rows)
        points = list(zip(*curves, strict=False))  # validated after about as many tokens
        for axis, key in ((left, "accept_rate"), (right, "emitted_per_cycle")):
            for one in curves:
                axis.plot([p["tokens"] for p in one], [p[key] for p in one], color=f"C{i}", alpha=0.25, linewidth=0.8)
            mean = [[statistics.fmean(p[name] for p in point) for point in points] for name in ("tokens", key)]
            axis.plot(
                *mean, color=f"C{i}", marker=".", label=stanza + (f", text drifts by {moved:.1f} nats" if moved else "")
            )
    for axis, label in ((left, "accepted of judged drafts"), (right, "emitted tokens per cycle")):
        axis.set_xlabel("tokens decoded and learned from")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    left.legend()
    figure.suptitle(f"validation prompts, {VALIDATED_K} drafted tokens per cycle", fontsize=10)
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__, argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stanzas", nargs="+", default=list(STANZAS), help=f"of experiments/{ENV}.yml")
    parser.add_argument("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="one run each")
    parser.add_argument("--texts", type=POSITIVE, default=300, help="prompts of the one pass")
    parser.add_argument("--conversations", type=input_file, help="log to read (default: the target writes user turns)")
    parser.add_argument(
        "--eval-freq", type=POSITIVE, default=3000, help="drafted tokens between the validations that are the curves"
    )
    parser.add_argument("--count", type=PROMPTS, default=30, help="held-out prompts of the table")
    parser.add_argument("--k", type=POSITIVE, default=VALIDATED_K, help="drafted tokens per cycle of the table")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="override keys of every stanza"
    )
    parser.add_argument(
        "--root", type=output_folder, default=Path("runs/bench-dvi"), help="where runs and results are written"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command goes on from the last checkpoint, if one was written yet"):
        stream = args.conversations or args.root / "conversations.jsonl"
        if args.conversations is None and not stream.exists():
            own = [s.removeprefix("env.") for s in args.set if s.startswith("env.target=")]
            write_own_text(stream, dict(setting.split("=", 1) for setting in own), args.texts, seed=0)
        found = compare(train_all(args, stream.resolve()), args.count, args.k)
        write_json(args.root / "bench-dvi.json", found)
        with whole(args.root / "bench-dvi.md") as path:
            path.write_text(markdown(found))
        draw(found, args.root / "bench-dvi.png")
        print(markdown(found))
        print(f"picture: {args.root / 'bench-dvi.png'}")


if __name__ == "__main__":
    main()
