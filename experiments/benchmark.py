"""Where adaptive control of speculative decoding pays, and where it does not (`make benchmark`).

Records traces, trains every arm on them with several seeds, tunes the published rules on the same training texts, and then
decodes held-out prompts live, all arms side by side. Beside them stand the best static setting S*, that of each task, the
informed optimum I* (the best policy of what an agent sees, cross-fitted) and the clairvoyant one C*. Writes
runs/benchmark.json, RESULTS.md and RESULTS.png. `FAST=1` is a small version of the same; `RAY=1` records and trains on Ray.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap, trim_mean

from experiments.benchmark_arms import GRIDS, Problem, informed, samples_of, train, trained_policy, tuned
from experiments.benchmark_checks import averaged, equality, played_at_random, recording_cost, speeds
from experiments.benchmark_report import draw, results_md
from experiments.bounds import Bounds
from experiments.command import one_sentence
from experiments.comparison import by_task, throughput, with_aa_check
from experiments.config import load_experiment
from experiments.costs import cost_curves
from experiments.live import decoder_for
from experiments.machine import machine
from experiments.scale_out import mapped
from experiments.static import static_like
from experiments.tables import run_tables
from experiments.trace import Plan, as_text, calibrated, claim, default_folder, record_texts, recorded
from spec_envs.controls import Policy
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.trace import MANIFEST, Trace
from spec_envs.files import write_json

PROBLEMS: dict[str, dict[str, Any]] = {  # keyword arguments of an environment, and of another pair of models
    "SpecDepth-v0": {},
    "SpecBudget-v0": {"depth": 2},
    "SpecTree-v0": {},
    "SpecK-v0": {"decision": "token"},
    "SpecK-v0/qwen2.5-coder-1.5b": {"decision": "token", "target": "qwen2.5-coder-1.5b", "k_max": 10},
}
LEARNED = ("hindsight", "exact-pg", "ppo", "ltd")
FOREIGN = ("qwen3-14b-a6000", "smollm2-135m-int8-xeon-amx-2")  # cost tables that nobody was trained under


class Size(NamedTuple):
    """How much of everything."""

    texts: tuple[int, int, int]  # recorded, of train, validation and test
    tokens: int
    seeds: int
    steps: int  # of PPO on the trace
    ltd_steps: int
    tuning: int  # training texts that rules are tuned on
    folds: int
    prompts: int  # live
    cycles: int  # of random play, live against replayed
    sampled: int  # prompts at temperature 1


FULL = Size((60, 12, 30), 96, 10, 100_000, 50_000, 20, 3, 20, 300, 10)
FAST = Size((4, 1, 3), 32, 2, 4096, 2048, 3, 2, 3, 40, 2)
LARGER = FULL._replace(tokens=64, prompts=18, cycles=120, sampled=6)  # of a pair that takes longer
FEW = (1, 3, 10, 30)  # training texts that hindsight is tried with


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
    problem = Problem(env_id, env, str(trace.folder))
    control = problem.control()
    decoder = decoder_for({**env, "trace": None}, control)

    def measured() -> CostTable:  # the machine as it is now; the trace may have been recorded at another time
        raw = CostTable("raw", **cost_curves(decoder))
        return CostTable("this machine, now", **calibrated(trace, decoder, raw))

    before = measured()
    played = played_at_random(trace, problem, size.cycles)
    table = averaged(before, measured())
    found: dict[str, Any] = {
        "costs": as_text({"verify": table.verify, "draft": table.draft}),
        "machine": machine(decoder),
    }
    found |= equality(trace, problem, table, played)
    found |= speeds(problem, found["live_steps_per_s"])
    found["recording"] = recording_cost(trace, decoder)

    bounds, test = (Bounds(trace, control, table, trace.of_split(split), size.tokens) for split in ("train", "test"))
    train_seconds, seconds = bounds.static(), test.static()
    best = bounds.best(train_seconds)
    static = seconds[:, best].sum()
    own_best = bounds.best_by_task(train_seconds)
    per_task = sum(seconds[i, own_best.get(task, best)] for i, task in enumerate(test.tasks))
    clairvoyant, plain = test.clairvoyant().sum(), test.tokens.sum() * table.seconds("verify", 1)
    found["static"] = list(bounds.names()[best])
    found["static_over_plain"] = plain / static
    found["per_task_over_static"] = static / per_task
    found["clairvoyant"] = static / clairvoyant
    found["informed"] = static / total_seconds(informed(problem, table, size.folds))

    arms = [arm for arm in LEARNED if arm != "ltd" or env_id != "SpecK-v0"]
    steps = {"ppo": size.steps, "ltd": size.ltd_steps}
    jobs = [
        (problem, arm, seed, steps.get(arm, 0), str(root / "benchmark" / name / f"{arm}-{seed}"))
        for arm in arms
        for seed in range(size.seeds)
    ]
    trainings = dict(zip([(job[1], job[2]) for job in jobs], mapped(train, jobs, f"training on {name}"), strict=True))
    found["hindsight_train_s"] = float(
        np.median([trainings["hindsight", seed]["seconds"] for seed in range(size.seeds)])
    )
    policies, replay = {"static": static_like(control, bounds.names()[best])}, {}
    for arm in arms:
        folders = [job[4] for job in jobs if job[1] == arm]
        validation = [throughput(samples_of(problem, trained_policy(f, table), "validation", table)) for f in folders]
        rates = [throughput(samples_of(problem, trained_policy(f, table), "test", table)) for f in folders]
        ratios = np.array(rates) * static / test.tokens.sum()
        replay[arm] = over_seeds(ratios) | {
            "train_seconds": float(np.median([trainings[arm, seed]["seconds"] for seed in range(size.seeds)])),
            "forwards": trainings[arm, 0]["forwards"],
        }
        chosen = folders[int(np.argmax(validation))]
        policies[arm] = trained_policy(chosen, table)
        replay[arm]["chosen"] = Path(chosen).name
    per_token = static / test.tokens.sum()
    for rule in GRIDS[env_id]:
        policies[rule], settings = tuned(problem, rule, table, size.tuning)
        replay[rule] = {"settings": settings} | {
            key: throughput(samples_of(problem, renewed(policies[rule]), "test", table, texts)) * per_token
            for key, texts in (("value", test.texts), ("by_domain", one_domain_after_another(trace, test.texts)))
        }
    found["replay"] = replay
    found["informed"] = max(found["informed"], *(row["value"] for row in replay.values() if "settings" in row))
    found["other_costs"] = other_costs(
        problem, trace, size, str(root / "benchmark" / name / replay["hindsight"]["chosen"])
    )
    found["few_texts"] = few_texts(problem, table, per_token, root / "benchmark" / name, size)
    samples = samples_of(problem, policies["hindsight"], "test", table)
    found["tasks"] = {
        task: sum(seconds[i, best] for i, own in enumerate(test.tasks) if own == task) / total_seconds(group)
        for task, group in by_task(samples).items()
    }

    live = played_live(policies, env, decoder, size.prompts)
    found["live"], found["arms"] = live, over_static(live)
    sampling = {**env, "temperature": 1.0}
    found["sampled"] = over_static(
        played_live(policies, sampling, decoder_for({**sampling, "trace": None}, control), size.sampled)
    )
    gap = found["clairvoyant"] - 1
    found["gap_share"] = (replay["hindsight"]["value"] - 1) / gap if gap > 0 else 0.0
    found["of_informed"] = replay["hindsight"]["value"] / found["informed"]
    return found


def played_live(policies: dict[str, Policy], env: dict[str, Any], decoder: Decoder, prompts: int) -> dict[str, Any]:
    """The table of all arms on held-out prompts, as they are now: what learns while it serves begins anew."""

    def measure(count: int) -> dict[str, Any]:
        fresh = {name: renewed(policy) for name, policy in policies.items()}
        return run_tables(fresh, {**env, "trace": None}, decoder, count, ["plain", "static"], list(policies)[1:], {})

    return with_aa_check(measure, prompts)


def renewed(policy: Policy) -> Policy:
    """The policy with an agent that has not played yet, for one that learns while it serves."""
    return Policy(policy.control, copy.deepcopy(policy.agent))


def over_static(live: dict[str, Any]) -> dict[str, Any]:
    """Each arm's throughput over the best static setting's, with its interval."""
    return {
        name: {"over_static": row["over_static"]["value"], **{k: row["over_static"][k] for k in ("low", "high")}}
        for name, row in live["arms"].items()
    }


def one_domain_after_another(trace: Trace, texts: Sequence[int]) -> list[int]:
    """Texts that come from the tasks in turn, task by task instead."""
    return sorted(texts, key=lambda i: trace.texts[i].task)


def total_seconds(samples: list[Any]) -> float:
    """Of all texts."""
    return sum(sample.seconds for sample in samples)


def over_seeds(ratios: np.ndarray) -> dict[str, Any]:
    """Interquartile mean over seeds with its 95 % bootstrap interval."""
    value = float(trim_mean(ratios, 0.25))
    if len(ratios) < 3 or np.ptp(ratios) == 0:
        return {"value": value, "low": float(ratios.min()), "high": float(ratios.max()), "seeds": ratios.tolist()}
    interval = bootstrap(
        (ratios,), lambda x, axis: trim_mean(x, 0.25, axis=axis), n_resamples=2000, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return {"value": value, "low": float(interval.low), "high": float(interval.high), "seeds": ratios.tolist()}


def other_costs(problem: Problem, trace: Trace, size: Size, folder: str) -> dict[str, Any]:
    """Hindsight with the same weights under cost tables that it has not seen, over the best static setting of each."""
    found = {}
    for name in FOREIGN:
        table, control = CostTable.load(name), problem.control()
        bounds, test = (
            Bounds(trace, control, table, trace.of_split(split), size.tokens) for split in ("train", "test")
        )
        best = bounds.best(bounds.static())
        static = test.static()[:, best].sum()
        seconds = total_seconds(samples_of(problem, trained_policy(folder, table), "test", table))
        found[name] = {"static": list(bounds.names()[best]), "over_static": static / seconds, "clairvoyant": static / test.clairvoyant().sum()}  # fmt: skip
    return found


def few_texts(
    problem: Problem, table: CostTable, seconds_per_token: float, folder: Path, size: Size
) -> list[dict[str, Any]]:
    """Hindsight after the first few training texts, by forwards of the target that recording them took."""
    found = []
    for count in sorted({min(n, size.texts[0]) for n in FEW}):
        folders = [str(folder / f"hindsight-of-{count}-{seed}") for seed in range(min(3, size.seeds))]
        made = [train(problem, "hindsight", seed, 0, f, count) for seed, f in enumerate(folders)]
        rates = [throughput(samples_of(problem, trained_policy(f, table), "test", table)) for f in folders]
        found.append(
            {"texts": count, "forwards": made[0]["forwards"], "value": float(np.mean(rates)) * seconds_per_token}
        )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--envs", nargs="*", choices=list(PROBLEMS), metavar="ENV",
        help=f"of {', '.join(PROBLEMS)} (default all; fast, those of the default pair)",
    )  # fmt: skip
    parser.add_argument("--root", type=Path, default=Path("runs"), help="where traces, runs and figures are written")
    parser.add_argument("--report", type=Path, default=Path(), help="folder of RESULTS.md and RESULTS.png (default .)")
    parser.add_argument(
        "--seeds", type=int, help=f"of every arm that is trained (default {FULL.seeds}, fast {FAST.seeds})"
    )
    parser.add_argument(
        "--count", type=int, help=f"held-out prompts, live (default {FULL.prompts}, fast {FAST.prompts})"
    )
    parser.add_argument("--fast", action="store_true", default=bool(os.environ.get("FAST")), help="the small version")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    size = FAST if args.fast else FULL
    root = args.root / "fast" if args.fast else args.root
    with one_sentence("interrupted; the same command goes on with what is not trained yet"):
        results: dict[str, Any] = {}
        for name in args.envs or [name for name in PROBLEMS if not (args.fast and "/" in name)]:
            own = LARGER if "/" in name and not args.fast else size
            own = own._replace(seeds=args.seeds or own.seeds, prompts=args.count or own.prompts)
            done = root / "benchmark" / name / "results.json"
            settings = json.loads(json.dumps(own._asdict()))
            if not done.exists():
                done.parent.mkdir(parents=True, exist_ok=True)
                write_json(done, measure(name, own, root) | {"settings": settings})
            results[name] = json.loads(done.read_text())
            if results[name]["settings"] != settings:
                raise ValueError(f"{done} was made with other settings; delete {done.parent}, or choose another --root")
            print(f"{name}: {done}")
    write_json(root / "benchmark.json", results)
    report = root if args.fast else args.report
    draw(results, report / "RESULTS.png")
    (report / "RESULTS.md").write_text(results_md(results, args.fast))
    print(f"written: {root}/benchmark.json, {report}/RESULTS.md, RESULTS.png")


if __name__ == "__main__":
    main()
