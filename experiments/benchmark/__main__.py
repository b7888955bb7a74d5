"""Where adaptive control of speculative decoding pays, and where it does not (`make benchmark`).

Records traces, trains every arm on them with several seeds, tunes the published rules on the same training texts, and then
decodes held-out prompts live, all arms side by side. Beside them stand the best static setting S*, that of each task, the
informed optimum I* (the best policy of what an agent sees, cross-fitted) and the clairvoyant one C*. Writes
runs/benchmark.json, RESULTS.md and RESULTS.png. `FAST=1` is a small version of the same; `RAY=1` records and trains on Ray.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from spec_envs.arguments import POSITIVE, PROMPTS, Parser, output_folder
from spec_envs.controls import Policy
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.traces.files import MANIFEST
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.benchmark.arms import Problem, samples_of
from spec_envs.experiments.benchmark.checks import equality, played_at_random, recording_cost, speeds
from spec_envs.experiments.benchmark.problems import FAST, FULL, LARGER, PROBLEMS, Size
from spec_envs.experiments.benchmark.replay import (
    bounded,
    few_texts,
    other_costs,
    renewed,
    ruled,
    total_seconds,
    trained,
)
from spec_envs.experiments.benchmark.report import draw, results_md
from spec_envs.experiments.benchmark.scale_out import mapped
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.measure.costs import cost_curves
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.experiments.measure.machine import machine
from spec_envs.experiments.measure.static import static_policy
from spec_envs.experiments.measure.statistics import by_task, with_aa_check
from spec_envs.experiments.measure.tables import run_tables
from spec_envs.experiments.traces.record import Plan, as_text, calibrated, claim, default_folder, record_texts, recorded
from spec_envs.files import held, read_json, whole, write_json


def trace_of(env_id: str, env: dict[str, Any], size: Size, root: Path) -> Trace:
    """The trace of a problem; on Ray its texts are recorded in shards."""
    plan = Plan(env_id, env, size.texts)
    folder = default_folder(plan, root)
    claim(plan, folder)
    if os.environ.get("RAY") and not (folder / MANIFEST).exists():
        mapped(record_texts, [(plan, folder, (i, 4)) for i in range(4)], "recording")
    return recorded(plan, folder)


def measure(name: str, size: Size, root: Path) -> dict[str, Any]:
    """Everything about one of ``PROBLEMS``."""
    env_id = name.partition("/")[0]
    env = {**load_experiment(env_id, "random").env, **PROBLEMS[name], "max_new_tokens": size.tokens}
    trace = trace_of(env_id, env, size, root)
    problem, folder = Problem(env_id, env, str(trace.folder)), root / "benchmark" / name
    control = problem.control()
    decoder = decoder_for({**env, "trace": None}, control)
    table, found = checked(problem, trace, decoder, size)
    static, references = bounded(problem, trace, table, size)
    found |= references

    policies, replay = trained(problem, name, table, static, size, folder)
    rules, rows = ruled(problem, trace, table, static, size)
    policies, replay = {"static": static_policy(control, static.setting), **policies, **rules}, replay | rows
    found["replay"] = replay
    found["hindsight_train_s"] = replay["hindsight"]["train_seconds"]
    found["informed"] = max(found["informed"], *(row["value"] for row in rows.values()))
    found["other_costs"] = other_costs(problem, trace, size, str(folder / replay["hindsight"]["chosen"]))
    found["few_texts"] = few_texts(problem, table, static.per_token, folder, size)
    samples = samples_of(problem, policies["hindsight"], "test", table)
    tasks = np.array([sample.prompt.task for sample in samples])
    found["tasks"] = {
        task: float(static.seconds[tasks == task].sum()) / total_seconds(group)
        for task, group in by_task(samples).items()
    }
    gap = found["clairvoyant"] - 1
    found["gap_share"] = (replay["hindsight"]["value"] - 1) / gap if gap > 0 else 0.0
    found["of_informed"] = replay["hindsight"]["value"] / found["informed"]

    live = played_live(policies, env, decoder, size.prompts)
    found["live"], found["arms"] = live, over_static(live)
    sampling = {**env, "temperature": 1.0}
    sampled = decoder_for({**sampling, "trace": None}, control)
    found["sampled"] = over_static(played_live(policies, sampling, sampled, size.sampled))
    return found


def checked(problem: Problem, trace: Trace, decoder: Decoder, size: Size) -> tuple[CostTable, dict[str, Any]]:
    """What forwards cost here and now, and what was found of the replay under these costs."""

    def measured() -> CostTable:  # the machine as it is now; the trace may have been recorded at another time
        raw = CostTable("raw", **cost_curves(decoder))
        return CostTable("this machine, now", **calibrated(trace, decoder, raw))

    played, table = played_at_random(trace, problem, size.cycles, measured)
    found: dict[str, Any] = {
        "costs": as_text({"verify": table.verify, "draft": table.draft}),
        "machine": machine(decoder),
    }
    found |= equality(trace, problem, table, played)
    found |= speeds(problem, found["live_steps_per_s"])
    return table, found | {"recording": recording_cost(trace, decoder)}


def played_live(policies: dict[str, Policy], env: dict[str, Any], decoder: Decoder, prompts: int) -> dict[str, Any]:
    """The table of all arms on held-out prompts, as they are now: what learns while it serves begins anew."""

    def measure(count: int) -> dict[str, Any]:
        fresh = {name: renewed(policy) for name, policy in policies.items()}
        return run_tables(fresh, {**env, "trace": None}, decoder, count, ["plain", "static"], list(policies)[1:], {})

    return with_aa_check(measure, prompts)


def over_static(live: dict[str, Any]) -> dict[str, Any]:
    """Each arm's throughput over the best static setting's, with its interval."""
    return {
        name: {"over_static": row["over_static"]["value"], **{k: row["over_static"][k] for k in ("low", "high")}}
        for name, row in live["arms"].items()
    }


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--envs", nargs="*", choices=list(PROBLEMS), metavar="ENV",
        help=f"of {', '.join(PROBLEMS)} (default all; fast, those of the default pair)",
    )  # fmt: skip
    parser.add_argument(
        "--root", type=output_folder, default=Path("runs"), help="where traces, runs and figures are written"
    )
    parser.add_argument(
        "--report", type=output_folder, default=Path(), help="folder of RESULTS.md and RESULTS.png (default .)"
    )
    parser.add_argument(
        "--seeds", type=POSITIVE, help=f"of every arm that is trained (default {FULL.seeds}, fast {FAST.seeds})"
    )
    parser.add_argument(
        "--count", type=PROMPTS, help=f"held-out prompts, live (default {FULL.prompts}, fast {FAST.prompts})"
    )
    parser.add_argument("--fast", action="store_true", default=switched("FAST"), help="the small version")
    return parser.parse_args()


def switched(name: str) -> bool:
    """Whether an environment variable is 1.

    Raises:
        ValueError: it is neither that nor 0.
    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} is {value!r}; expected 1, or 0")
    return value == "1"


def main() -> None:
    with one_sentence("interrupted; the same command goes on with what is not trained yet"):
        args = arguments()
        root = args.root / "fast" if args.fast else args.root
        with held(root / "benchmark"):
            results = measured(args, root)
        write_json(root / "benchmark.json", results)
        report = root if args.fast else args.report
        report.mkdir(parents=True, exist_ok=True)
        draw(results, report / "RESULTS.png")
        with whole(report / "RESULTS.md") as path:
            path.write_text(results_md(results, args.fast))
        print(f"written: {root}/benchmark.json, {report}/RESULTS.md, RESULTS.png")


def measured(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The figures of every problem, measured as far as they are not there yet.

    Raises:
        ValueError: they were measured with other settings, or their file is damaged.
    """
    size, results = FAST if args.fast else FULL, dict[str, Any]()
    for name in args.envs or [name for name in PROBLEMS if not (args.fast and "/" in name)]:
        own = LARGER if "/" in name and not args.fast else size
        own = own._replace(seeds=args.seeds or own.seeds, prompts=args.count or own.prompts)
        done = root / "benchmark" / name / "results.json"
        settings = json.loads(json.dumps(own._asdict()))
        if not done.exists():
            done.parent.mkdir(parents=True, exist_ok=True)
            write_json(done, measure(name, own, root) | {"settings": settings})
        results[name] = read_json(done, f"delete {done.parent} to measure again")
        if not isinstance(results[name], dict) or results[name].get("settings") != settings:
            raise ValueError(f"{done} was made with other settings; delete {done.parent}, or choose another --root")
        print(f"{name}: {done}")
    return results


if __name__ == "__main__":
    main()
