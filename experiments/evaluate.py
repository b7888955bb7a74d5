"""Measure a trained policy beside plain decoding, a random policy, the best static setting and transformers.

`spec-envs eval runs/…` makes a run's table again; `spec-envs eval --depth "6 runs/…" --budget "32 runs/…"` measures
every combination of fixed and learned depths and budgets.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from spec_envs import agents, recordings
from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.arguments import PROMPTS, TEMPERATURE, TOKENS, Parser, input_folder, nonempty, output_folder
from spec_envs.controls import Control, Policy, make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.choosing.evaluation import evaluate_choice
from spec_envs.experiments.command import STATIC, TABLE, Stages, one_sentence
from spec_envs.experiments.exits.evaluation import evaluate_exit
from spec_envs.experiments.measure.encoding import load, to_json
from spec_envs.experiments.measure.link_references import link_policies
from spec_envs.experiments.measure.live import decoder_for, target_and_drafter
from spec_envs.experiments.measure.lookup import lookup_policy
from spec_envs.experiments.measure.machine import machine
from spec_envs.experiments.measure.price_list import kept
from spec_envs.experiments.measure.results import ALONE, COPIES, LOOKUP, PAIR, Best, Results
from spec_envs.experiments.measure.static import (
    best_recorded,
    best_static,
    pair_policy,
    policy_by_copies,
    search_in_words,
    static_policy,
    weighable,
    without_alternatives,
)
from spec_envs.experiments.measure.statistics import with_aa_check
from spec_envs.experiments.measure.tables import run_tables
from spec_envs.experiments.mixes import mixed
from spec_envs.experiments.reports.report import draw, markdown
from spec_envs.experiments.reports.screen import screen, sentences
from spec_envs.experiments.traces.of_runs import known_trace
from spec_envs.files import whole
from spec_envs.prompts.sets import load_prompts
from spec_envs.sealed import write_sealed
from spec_envs.settings import Keywords

CHOSEN = "static.json"  # in a run: its best static setting


def evaluate_run(
    run: Path, overrides: Keywords, test_prompts: int | None = None, stages: Stages | None = None
) -> Results:
    """Return the table of a run: plain decoding, a random policy, the best static setting (if the problem has static
    settings), the trained policy, and transformers.

    Args:
        overrides: keyword arguments of the environment that replace the run's; the static setting is then chosen again.
        test_prompts: number of held-out prompts; by default that of the run.
        stages: of the command; by default those of the table alone.

    Raises:
        ValueError: the folder is not a run, or an override would have no effect on it.
    """
    config = agents.read_config(run)
    env = {**config["env"], **config.get("eval_env", {}), **overrides}
    check_overrides(overrides, env)
    control, agent = agents.load(run)
    stages = stages or Stages(stages_left(run, control, bool(overrides)))
    if control.exit:
        return evaluate_exit(Policy(control, agent), run, env, test_prompts or config["test_prompts"], stages)
    if control.drafters:
        chosen = None if overrides else run / CHOSEN
        return evaluate_choice(Policy(control, agent), run, env, chosen, test_prompts or config["test_prompts"], stages)
    decoder = decoder_for(env, control)
    clock, static = decoder.clock, None
    costs = clock.table if isinstance(clock, PricedClock) else kept(run, machine(decoder))
    if control.settings():
        if overrides or not (run / CHOSEN).exists():
            trace = None if overrides else known_trace(run, config)
            stages.begin(STATIC, search_in_words(env, control, costs, trace is not None))
        static = best_static_of(run, env if overrides else None, control, costs)
    without_partner = make_control(config["id"], env)
    without_partner.costs = control.costs
    name = config["agent"]
    policies = {"random": Policy(without_partner, RandomAgent(without_partner, seed=0))}
    references = ["plain"]
    if static:
        for evaluated in (control, without_partner):
            evaluated.fix_drawn(*static.best)
        fixed = {"static": static_policy(control, static.best)}
        if control.link:
            fixed |= link_policies(control, decoder, static)
        if static.pair and static.pair != static.best:
            fixed |= {PAIR: pair_policy(control, static.pair)}
        if static.lookup and not static.looks_up:
            fixed |= {LOOKUP: lookup_policy(*static.lookup)}
        if static.alone and (without := without_alternatives(control)):
            fixed |= {ALONE: static_policy(without, static.alone)}
        if static.copied and static.copied != 2 * static.best:
            fixed |= {COPIES: policy_by_copies(control, static.copied)}
        policies |= fixed
        references += fixed
    policies[name] = Policy(control, agent)

    def measure(count: int) -> Results:
        announce = partial(stages.begin, TABLE)
        found = run_tables(policies, env, decoder, count, references, [name], costs=costs, announce=announce)
        return replace(found, static=static)

    return with_aa_check(measure, test_prompts or config["test_prompts"])


def stages_left(run: Path, control: Control, other: bool = False) -> list[str]:
    """Return the stages of a table that are still to come; ``other``: with other keyword arguments than the run's."""
    searched = control.exit or (control.settings() and (other or not (run / CHOSEN).exists()))
    return [STATIC, TABLE] if searched else [TABLE]


def best_static_of(run: Path, env: Keywords | None, control: Control, costs: CostTable | None) -> Best:
    """Return the best static setting for other keyword arguments of the environment; for None that of the run itself,
    which is kept in its folder."""
    if env is not None:
        return best_static(env, control, costs)
    file = run / CHOSEN
    if not file.exists():
        config = agents.read_config(run)
        trace, env = known_trace(run, config), config["env"]
        if isinstance(trace, Trace) and weighable(control):
            tokens = int(env.get("max_new_tokens") or trace.max_new_tokens)
            best = best_recorded(trace, control, costs or trace.costs(), tokens)
        else:
            best = best_static(env, control, costs)
        write_sealed(file, to_json(best))
    return load(Best, file, "delete it to measure again")


def check_overrides(overrides: Keywords, env: Keywords) -> None:
    """Refuse overrides without effect, and unknown prompt sets.

    Args:
        env: all keyword arguments of the evaluation.

    Raises:
        ValueError: a prompt set is unknown, or an override has no effect on a run that replays a trace.
    """
    trace = env.get("trace")
    if not trace:
        if {"prompts", "data_dir"} & set(overrides):
            load_prompts(env.get("prompts", "all"), "test", env.get("data_dir"))
        return
    if ignored := sorted(set(overrides) - {"clock", "max_new_tokens", "prompts"}):
        raise ValueError(
            f"{', '.join(ignored)} cannot be set, because the run is replayed from the trace {trace!r}, which was "
            "recorded with other values"
        )
    if "prompts" in overrides:
        recordings.load(trace).prompts("test", overrides["prompts"])


def evaluate_mixes(depths: Sequence[str], budgets: Sequence[str], given: Keywords, test_prompts: int) -> Results:
    """Return the table of every combination of depths and budgets, each a number or a run folder."""
    trained = [agents.read_config(Path(value))["env"] for value in (*depths, *budgets) if not value.isdecimal()]
    if len({target_and_drafter(env) for env in trained}) > 1:
        raise ValueError("the runs were trained with different targets or drafters; give runs of the same models")
    env = (trained[0] if trained else {}) | given
    check_overrides(given, env)
    policies, learned = {}, []
    for depth, budget in itertools.product(depths, budgets):
        name = f"depth {depth}, budget {budget}"
        policies[name] = mixed(depth, budget, env)
        if not (depth + budget).isdecimal():
            learned.append(name)
    decoder = decoder_for(env, next(iter(policies.values())).control)
    return with_aa_check(lambda count: run_tables(policies, env, decoder, count, ["plain"], learned), test_prompts)


def save(results: Results, folder: Path, again: str, run: Path | None) -> None:
    """Write results.png, results.md and finally results.json into a folder, and print what they show.

    Args:
        again: command that makes the table again.
        run: folder of the run; None if the table is not of one run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw(results, folder / "results.png")
    with whole(folder / "results.md") as path:
        path.write_text("\n".join([*sentences(results), "", markdown(results)]).lstrip("\n"))
    write_sealed(folder / "results.json", to_json(results) | to_json(results.verdicts()))
    print(screen(results, folder, again, run))


def folder_name(settings: Mapping[str, object]) -> str:
    """Return the name of an evaluation's folder: its settings, cut to a length that every file system accepts."""
    name = "-".join(re.sub(r"[^\w.]+", "_", f"{key}={value}").strip("_") for key, value in settings.items())
    return name if len(name) <= 150 else f"{name[:140]}-{zlib.crc32(name.encode()):08x}"


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="run folder")
    parser.add_argument(
        "--depth", default="", help="depths, each a number or a run folder, separated by spaces (default 1)"
    )
    parser.add_argument(
        "--budget", default="", help="budgets, each a number or a run folder, separated by spaces (default 7)"
    )
    parser.add_argument(
        "--data-dir", type=input_folder, help="folder of NAME/question.jsonl files (default: the shipped prompts)"
    )
    parser.add_argument("--prompts", type=nonempty, help="prompt sets, separated by commas")
    parser.add_argument("--count", type=PROMPTS, help="number of held-out prompts (default: the run's, or 15)")
    parser.add_argument(
        "--dtype", type=nonempty, help="auto, int8, q4, bfloat16, float16 or float32 (default: the run's)"
    )
    parser.add_argument("--clock", type=nonempty, help="wall, or a cost table (default: the run's)")
    parser.add_argument(
        "--temperature", type=TEMPERATURE, help="sampling temperature of the target (default: the run's)"
    )
    parser.add_argument("--max-new-tokens", type=TOKENS, help="most new tokens per prompt (default: the run's)")
    parser.add_argument(
        "--out",
        type=output_folder,
        help="folder of the results (default: the run's; with other settings one in its eval/, for mixes one in "
        "runs/mixes/)",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    given = {
        "data_dir": str(args.data_dir) if args.data_dir else None,
        "prompts": args.prompts,
        "dtype": args.dtype,
        "clock": args.clock,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    again = shlex.join(["spec-envs", "eval", *sys.argv[1:]])
    with one_sentence():
        depths, budgets = (list(dict.fromkeys(text.split())) for text in (args.depth, args.budget))
        if args.run and (depths or budgets):
            raise ValueError("give a run, or depths and budgets, not both: runs/…, or --depth … and --budget …")
        if depths or budgets:
            depths, budgets = depths or ["1"], budgets or ["7"]
            results = evaluate_mixes(depths, budgets, overrides, args.count or 15)
            mix = {"depth": depths, "budget": budgets, **overrides, "count": args.count or 15}
            save(results, args.out or Path("runs/mixes") / folder_name(mix), again, None)
        elif args.run:
            other_count = args.count not in (None, agents.read_config(args.run)["test_prompts"])
            settings = overrides | ({"count": args.count} if other_count else {})
            results = evaluate_run(args.run, overrides, args.count)
            folder = args.out or (args.run / "eval" / folder_name(settings) if settings else args.run)
            save(results, folder, again, args.run)
        else:
            raise ValueError("nothing to evaluate: give runs/…, or --depth … and --budget …")


if __name__ == "__main__":
    main()
