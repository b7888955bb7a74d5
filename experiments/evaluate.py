"""What policies are worth: live against plain decoding, a random one, the best static setting and transformers.

`make eval RUN=runs/…` makes a run's table again; `make eval DEPTH="6 runs/…" BUDGET="32 runs/…"` runs every mix of
fixed and learned depth and budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import agents
from agents.random import RandomAgent
from experiments.arms import Arm, Sample, decoded, run_arms
from experiments.command import one_sentence
from experiments.comparison import by_task, divergences, same_text, summary, throughput, with_aa_check
from experiments.costs import cost_curves, describe
from experiments.link_references import link_policies, played_by_state
from experiments.live import decoder_for, encoded_prompts, local_decoder, target_and_drafter
from experiments.machine import machine
from experiments.references import transformers_arms
from experiments.report import draw, markdown, settings_played
from experiments.static import best_like, static_like, static_policy
from spec_envs import ENVIRONMENTS
from spec_envs.controls import Control, Policy, make_control
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.topk import TopKControl
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.pair import DEFAULT_TARGET
from spec_envs.files import whole, write_json
from spec_envs.network.linked import is_address


def run_tables(
    policies: dict[str, Policy],
    env: dict[str, Any],
    decoder: Decoder,
    test_prompts: int,
    references: Sequence[str],
    learned: Sequence[str],
    others: dict[str, Arm] | None = None,
) -> dict[str, Any]:
    """Run plain decoding (twice), other software and the policies side by side; everything a table needs.

    Args:
        references: arms that all are compared with.
        learned: policies whose actions are shown.
        others: arms of other software; transformers' ``generate`` by default.
    """
    samples = side_by_side(policies, env, decoder, test_prompts, others)
    return tables(samples, policies, env, decoder, references, learned)


def side_by_side(
    policies: dict[str, Policy],
    env: dict[str, Any],
    decoder: Decoder,
    test_prompts: int,
    others: dict[str, Arm] | None = None,
) -> dict[str, list[Sample]]:
    """Every arm of a table on the held-out prompts."""
    prompts = encoded_prompts(env, "test", test_prompts)
    plain = decoder.plain()
    arms: dict[str, Arm] = {"plain": decoded(plain, None), "plain again": decoded(plain, None)}
    if not decoder.clock.priced and decoder.in_process:
        arms |= transformers_arms(env.get("target", DEFAULT_TARGET), decoder) if others is None else others
    decoders = {name: decoder.separate() for name in policies}
    arms |= {name: decoded(decoders[name], policy) for name, policy in policies.items()}
    try:
        return run_arms(arms, prompts, env.get("max_new_tokens", 128), "held-out prompts")
    finally:
        for used in (plain, *decoders.values()):
            used.close()


def tables(
    samples: dict[str, list[Sample]],
    policies: dict[str, Policy],
    env: dict[str, Any],
    decoder: Decoder,
    references: Sequence[str],
    learned: Sequence[str],
) -> dict[str, Any]:
    """What a table shows of the arms that were run."""
    control = next(iter(policies.values())).control
    curves = None
    if not decoder.clock.priced and isinstance(control, TopKControl) and not is_address(control.link):
        curves = cost_curves(local_decoder(env, control))
    elif not decoder.clock.priced and decoder.in_process:
        curves = cost_curves(decoder)
    results: dict[str, Any] = {
        "arms": summary(samples, references),
        "references": list(references),
        "prompts": len(samples["plain"]),
        "tasks": list(by_task(samples["plain"])),
        "max_new_tokens": env.get("max_new_tokens", 128),
        "temperature": decoder.temperature,
        "machine": machine(decoder),
        "seconds": curves,
        "curves": describe(curves) if curves else None,
        "actions": {name: settings_played(policies[name].control, samples[name]) for name in learned},
        "decisions": {name: policies[name].control.name for name in learned},
        "by_task": {
            name: {task: throughput(group) for task, group in by_task(arm).items()} for name, arm in samples.items()
        },
    }
    if isinstance(control, TopKControl):
        results["link"] = control.link
        if not is_address(control.link):
            results["by_state"] = {name: played_by_state(control, samples[name]) for name in learned}
        results["bytes_per_token"] = {
            name: [sum(getattr(s, way) for s in arm) / sum(s.tokens for s in arm) for way in ("bytes_up", "bytes_down")]
            for name, arm in samples.items()
        }
    if decoder.in_process and not decoder.temperature:
        results["divergences"] = {
            name: divergences(decoder, samples[name]) | {"same_text": same_text(samples[name], samples["plain"])}
            for name in ("plain", *learned)
        }
    return results


def evaluate_run(run: Path, overrides: dict[str, Any], test_prompts: int | None = None) -> dict[str, Any]:
    """The table of one run: plain, random, best static setting, trained policy, transformers.

    Args:
        overrides: environment keywords other than the run's; the static setting is then chosen anew.
        test_prompts: how many; the run's own number by default.
    """
    config = agents.read_config(run)
    env = {**config["env"], **config.get("eval_env", {}), **overrides}
    control, agent = agents.load(run)
    decoder = decoder_for(env, control)
    static_file = run / "static.json"
    if overrides or not static_file.exists():
        static = best_like(env if overrides else config["env"], control)
        if not overrides:
            write_json(static_file, static)
    else:
        static = json.loads(static_file.read_text())
    alone = make_control(ENVIRONMENTS[config["id"]], env)
    alone.costs = control.costs
    for played in (control, alone):
        if isinstance(played, BudgetControl) and played.depth == "random":  # of training only
            played.depth = static["best"][0]
    name = config["agent"]
    policies = {
        "random": Policy(alone, RandomAgent(alone, seed=0)),
        "static": static_like(control, static["best"]),
    }
    references = ["plain", "static"]
    if isinstance(control, TopKControl):
        policies |= link_policies(control, decoder, static)
        references += [reference for reference in policies if reference not in ("random", "static")]
    policies[name] = Policy(control, agent)

    def measure(count: int) -> dict[str, Any]:
        return run_tables(policies, env, decoder, count, references, [name]) | {"static": static}

    return with_aa_check(measure, test_prompts or config["test_prompts"])


def evaluate_mixes(
    depths: Sequence[str], budgets: Sequence[str], given: dict[str, Any], test_prompts: int
) -> dict[str, Any]:
    """Every mix of depths and budgets, each a number or a run folder."""
    trained = [agents.read_config(Path(value))["env"] for value in (*depths, *budgets) if not value.isdigit()]
    if len({target_and_drafter(env) for env in trained}) > 1:
        raise ValueError("the runs were trained with different targets or drafters; they cannot be mixed")
    env = (trained[0] if trained else {}) | given
    policies, learned = {}, []
    for depth, budget in itertools.product(depths, budgets):
        name = f"depth {depth}, budget {budget}"
        policies[name] = mixed(depth, budget, env)
        if not (depth + budget).isdigit():
            learned.append(name)
    decoder = decoder_for(env, next(iter(policies.values())).control)
    return with_aa_check(lambda count: run_tables(policies, env, decoder, count, ["plain"], learned), test_prompts)


def mixed(depth: str, budget: str, env: dict[str, Any]) -> Policy:
    """The policy for one depth and one budget, each a number or a run folder."""
    sizes = {key: env[key] for key in ("width", "max_depth") if key in env}
    if depth.isdigit() and budget.isdigit():
        return static_policy(int(depth), int(budget), **sizes)
    if depth.isdigit():
        sized = learned_policy(budget, BudgetControl)
        if not 0 <= int(depth) <= sized.control.max_depth:
            raise ValueError(f"depth is {depth}; expected 0 to {sized.control.max_depth}")
        sized.control.depth = int(depth)  # type: ignore[attr-defined]
        return sized
    policy = learned_policy(depth, DepthControl)
    if budget.isdigit():
        policy.control.budget = int(budget)  # type: ignore[attr-defined]
    else:
        partner = learned_policy(budget, BudgetControl)
        policy.control.compose(partner.control, partner.agent)
    return policy


def learned_policy(run: str, kind: type[Control]) -> Policy:
    """The policy of a run of one problem, without its partner."""
    control, agent = agents.load(run)
    if not isinstance(control, kind):
        raise ValueError(f"{run} is not a run of {kind.__name__}; give it as the other of DEPTH and BUDGET")
    control.partner = None
    return Policy(control, agent)


def save(results: dict[str, Any], folder: Path) -> None:
    """results.png, results.md and, last, results.json in a folder; the table is printed too."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(results, folder / "results.png")
    with whole(folder / "results.md") as path:
        path.write_text(markdown(results))
    write_json(folder / "results.json", results)
    print(markdown(results))
    print(f"picture: {folder / 'results.png'}")


def folder_name(settings: dict[str, Any]) -> str:
    """The settings of an evaluation as the name of its folder, of a length that every file system takes."""
    name = "-".join(re.sub(r"[^\w.]+", "_", f"{key}={value}").strip("_") for key, value in settings.items())
    return name if len(name) <= 150 else f"{name[:140]}-{zlib.crc32(name.encode()):08x}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run")
    parser.add_argument(
        "--depth", default="", help="depths, each a number or a run folder, separated by spaces (default 1)"
    )
    parser.add_argument(
        "--budget", default="", help="budgets, each a number or a run folder, separated by spaces (default 7)"
    )
    parser.add_argument("--data-dir", help="folder of NAME/question.jsonl files (default: the shipped prompts)")
    parser.add_argument("--prompts", help="prompt sets, separated by commas")
    parser.add_argument("--count", type=int, help="held-out prompts (default: as many as the run had, or 15)")
    parser.add_argument("--dtype", help="auto, int8, bfloat16, float32 (default: the run's)")
    parser.add_argument("--clock", help="wall, or a cost table (default: the run's)")
    parser.add_argument("--temperature", type=float, help="of the target (default: the run's)")
    parser.add_argument("--max-new-tokens", type=int, help="per prompt (default: the run's)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results (default: the run's, or one below its eval/ or runs/mixes/ named by the settings)",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    given = {
        "data_dir": args.data_dir,
        "prompts": args.prompts,
        "dtype": args.dtype,
        "clock": args.clock,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    with one_sentence():
        if args.depth or args.budget:
            depths, budgets = args.depth.split() or ["1"], args.budget.split() or ["7"]
            results = evaluate_mixes(depths, budgets, overrides, args.count or 15)
            mix = {"depth": depths, "budget": budgets, **overrides, "count": args.count or 15}
            save(results, args.out or Path("runs/mixes") / folder_name(mix))
        elif args.run:
            other_count = args.count not in (None, agents.read_config(args.run)["test_prompts"])
            settings = overrides | ({"count": args.count} if other_count else {})
            results = evaluate_run(args.run, overrides, args.count)
            save(results, args.out or (args.run / "eval" / folder_name(settings) if settings else args.run))
        else:
            raise ValueError("nothing to evaluate: give RUN=runs/…, or DEPTH=… and BUDGET=…")


if __name__ == "__main__":
    main()
