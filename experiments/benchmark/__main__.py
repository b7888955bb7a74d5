"""Measure where adaptive control of speculative decoding pays, and where it does not (`spec-envs bench adaptive`).

Records traces, trains every arm on them with several seeds, tunes the published rules on the same training texts, and
then decodes held-out prompts live, all arms side by side. They are compared with the best static setting S*, the best
static setting of each task and the clairvoyant optimum C*. Writes adaptive-control.json, adaptive-control.md and
adaptive-control.png into --out. `--fast` runs a small version, whose files are adaptive-control-fast.*. With the
environment variable `RAY=1` it records and trains on Ray.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from spec_envs.arguments import POSITIVE, PROMPTS, Parser, output_folder, whole_number
from spec_envs.controls import Control, Policy, make_control
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.decoder import Decoder, over_models
from spec_envs.decoding.traces.files import MANIFEST
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.benchmark.arms import PRICES, Problem, samples_of
from spec_envs.experiments.benchmark.checks import decoded_at_random, equality, recording_cost, speeds
from spec_envs.experiments.benchmark.findings import Benchmark, Checks, Findings, Learned, OverStatic
from spec_envs.experiments.benchmark.problems import FAST, FULL, LARGER, PROBLEMS, Size
from spec_envs.experiments.benchmark.replay import (
    bounded,
    few_texts,
    other_costs,
    renewed,
    rows_of,
    ruled,
    total_seconds,
    trained,
)
from spec_envs.experiments.benchmark.report import PAGE
from spec_envs.experiments.benchmark.scale_out import mapped
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.measure.encoding import from_json, to_json
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.experiments.measure.lookup import lookup_policy
from spec_envs.experiments.measure.machine import machine
from spec_envs.experiments.measure.price_list import kept, price_list, training_prompts
from spec_envs.experiments.measure.results import ALONE, COPIES, LOOKUP, PAIR, Results, looked_up
from spec_envs.experiments.measure.static import (
    pair_policy,
    policy_by_copies,
    static_policy,
    without_alternatives,
)
from spec_envs.experiments.measure.statistics import by_task, with_aa_check
from spec_envs.experiments.measure.tables import run_tables
from spec_envs.experiments.reports.pages import add_page_arguments
from spec_envs.experiments.traces.plan import Plan, default_folder
from spec_envs.experiments.traces.record import record_shard, recorded
from spec_envs.files import held, read_json, write_json
from spec_envs.prompts.rows import Split
from spec_envs.sealed import write_sealed
from spec_envs.settings import Keywords


def trace_of(env_id: str, env: Keywords, size: Size, root: Path) -> Trace:
    """Return the trace of a problem, recorded if it does not exist yet; on Ray its texts are recorded in shards."""
    plan = Plan(env_id, env, size.texts, size.held_out)
    folder = default_folder(plan, root)
    if os.environ.get("RAY") and not (folder / MANIFEST).exists():
        mapped(record_shard, [(plan, folder, (i, 4)) for i in range(4)], "recording")
    return recorded(plan, folder)


def measure(name: str, size: Size, root: Path) -> Findings:
    """Return the findings on one of ``PROBLEMS``."""
    env_id = name.partition("/")[0]
    env = {**load_experiment(env_id, "random").env, **PROBLEMS[name], "max_new_tokens": size.tokens}
    trace, folder = trace_of(env_id, env, size, root), root / "benchmark" / name
    control = make_control(env_id, env)
    decoder = over_models(decoder_for({**env, "trace": None}, control))
    prices = root / "benchmark" / trace.folder.name / PRICES  # one list for all problems of the same trace
    problem = Problem(env_id, env, str(trace.folder), str(prices_of(decoder, control, env, prices)))
    checks = checked(problem, trace, decoder, size)
    static, references = bounded(problem, trace, size)

    arms = trained(problem, name, size, folder) | ruled(problem, trace, size)
    rows = rows_of(arms, static)
    fixed = {"static": static_policy(control, static.setting)}
    if tuple(static.pair) != static.setting:
        fixed[PAIR] = pair_policy(control, static.pair)
    if references.lookup and looked_up(static.pair) is None:
        fixed[LOOKUP] = lookup_policy(*references.lookup)
    if references.alone and (without := without_alternatives(control)):
        fixed[ALONE] = static_policy(without, references.alone)
    if static.copied:
        fixed[COPIES] = policy_by_copies(control, static.copied)
    policies = fixed | {arm: found.policy for arm, found in arms.items()}
    hindsight = rows["hindsight"]
    assert isinstance(hindsight, Learned)
    samples = samples_of(problem, policies["hindsight"], size.held_out)
    tasks = np.array([sample.prompt.task for sample in samples])
    gap = references.clairvoyant - 1

    live = decoded_live(policies, env, decoder, size.prompts, problem.table, size.held_out)
    sampling = {**env, "temperature": 1.0}
    sampled = over_models(decoder_for({**sampling, "trace": None}, control))
    return Findings(
        settings=size,
        checks=checks,
        references=references,
        replay=rows,
        hindsight_train_s=hindsight.train_seconds,
        other_costs=other_costs(problem, trace, size, str(folder / hindsight.chosen)),
        few_texts=few_texts(problem, static.per_token, folder, size),
        tasks={
            task: float(static.seconds[tasks == task].sum()) / total_seconds(group)
            for task, group in by_task(samples).items()
        },
        gap_share=(hindsight.value - 1) / gap if gap > 0 else 0.0,
        live=live,
        arms=over_static(live),
        sampled=over_static(decoded_live(policies, sampling, sampled, size.sampled, problem.table, size.held_out)),
    )


def prices_of(decoder: Decoder, control: Control, env: Keywords, file: Path) -> Path:
    """Return the file of the price list of all arms, which is measured once.

    Raises:
        ValueError: it is there, but of another machine.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        made = price_list(decoder, control, training_prompts(env), env["max_new_tokens"])
        write_sealed(file, to_json(made))
    elif kept(file.parent, machine(decoder)) is None:
        raise ValueError(f"{file} was measured on another machine; delete {file.parent} to measure again")
    return file


def checked(problem: Problem, trace: Trace, decoder: Decoder, size: Size) -> Checks:
    """Return the checks of the replay under the price list of all arms."""
    live = decoded_at_random(trace, problem, size)
    return Checks(
        costs={"verify": problem.table.verify, "draft": problem.table.draft},
        machine=machine(decoder),
        replay_equals_live=equality(trace, problem, problem.table, live),
        speeds=speeds(problem, live),
        recording=recording_cost(trace, decoder),
    )


def decoded_live(
    policies: dict[str, Policy], env: Keywords, decoder: Decoder, prompts: int, table: CostTable, split: Split
) -> Results:
    """Return the table of all arms on held-out prompts that are decoded live, and priced by the table that they were
    trained under. Agents that learn while they serve start from their initial state."""
    fixed = [name for name in ("static", PAIR, ALONE, COPIES, LOOKUP) if name in policies]
    learned = [name for name in policies if name not in fixed]

    def measure(count: int) -> Results:
        fresh = {name: renewed(policy) for name, policy in policies.items()}
        without = {**env, "trace": None}
        return run_tables(fresh, without, decoder, count, ["plain", *fixed], learned, {}, table, split=split)

    return with_aa_check(measure, prompts)


def over_static(live: Results) -> dict[str, OverStatic]:
    """Return the ratio of each arm's throughput to that of the best static setting."""
    ratios = {name: row.over["static"] for name, row in live.arms.items()}
    return {name: OverStatic(ratio.value, ratio.low, ratio.high) for name, ratio in ratios.items()}


def parser_of(description: str | None, out: Path | None = Path("runs/bench"), shown: str = "runs/bench") -> Parser:
    """Return the parser of a command that runs the benchmark.

    Args:
        out: default of ``--out``, which the help shows as ``shown``.
    """
    parser = Parser(description)
    parser.add_argument(
        "--envs", nargs="*", choices=list(PROBLEMS), metavar="ENV",
        help=f"problems, of {', '.join(PROBLEMS)} (default: all; fast: those of the default models)",
    )  # fmt: skip
    parser.add_argument(
        "--root", type=output_folder, default=Path("runs"), help="folder of traces, runs and findings (default runs)"
    )
    add_page_arguments(parser, out, shown)
    parser.add_argument(
        "--seeds", type=POSITIVE, help=f"seeds of every arm that is trained (default {FULL.seeds}, fast {FAST.seeds})"
    )
    parser.add_argument(
        "--ltd-seeds", type=whole_number(0), metavar="SEEDS",
        help=f"most seeds of Learning to Draft, 0 leaves it out (default {FULL.ltd_seeds}, fast {FAST.ltd_seeds})",
    )  # fmt: skip
    parser.add_argument(
        "--count", type=PROMPTS, help=f"held-out prompts decoded live (default {FULL.prompts}, fast {FAST.prompts})"
    )
    parser.add_argument("--fast", action="store_true", default=switched("FAST"), help="run the small version")
    return parser


def switched(name: str) -> bool:
    """Return True if an environment variable is 1, and False if it is 0 or not set.

    Raises:
        ValueError: it has another value.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} is {value!r}; expected 1, or 0")
    return value == "1"


def main() -> None:
    with one_sentence("interrupted; the same command continues with what is not trained yet"):
        args = parser_of(__doc__).parse_args()
        root = args.root / "fast" if args.fast else args.root
        PAGE.publish(args, lambda: benchmark(args, root), "adaptive-control-fast" if args.fast else "adaptive-control")


def problems_of(args: argparse.Namespace) -> list[str]:
    """Return the problems that a command measures, of ``PROBLEMS``."""
    return args.envs or [name for name in PROBLEMS if not (args.fast and "/" in name)]


def benchmark(args: argparse.Namespace, root: Path, held_out: Split = "test") -> Benchmark:
    """Return the findings on every problem; those that do not exist yet are measured.

    Args:
        root: folder of traces, runs and findings.
        held_out: split of the texts that arms are scored on.

    Raises:
        ValueError: a file of findings was made with other settings, or is damaged.
    """
    size, problems = FAST if args.fast else FULL, {}
    with held(root / "benchmark"):
        for name in problems_of(args):
            own = LARGER if "/" in name and not args.fast else size
            own = replace(
                own,
                seeds=args.seeds or own.seeds,
                ltd_seeds=own.ltd_seeds if args.ltd_seeds is None else args.ltd_seeds,
                prompts=args.count or own.prompts,
                held_out=held_out,
            )
            path = root / "benchmark" / name / "results.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, to_json(measure(name, own, root)))
            problems[name] = found(path, own)
            print(f"{name}: {path}")
    return Benchmark(problems=problems, fast=args.fast)


def found(path: Path, size: Size) -> Findings:
    """Return the findings in a file.

    Raises:
        ValueError: the file was made with other settings, or is damaged.
    """
    content = read_json(path, remedy := f"delete {path.parent} to measure again")
    if not isinstance(content, dict) or content.get("settings") != to_json(size):
        raise ValueError(f"{path} was made with other settings; delete {path.parent}, or choose another --root")
    try:
        return from_json(Findings, content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from None


if __name__ == "__main__":
    main()
