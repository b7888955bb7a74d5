"""What policies are worth: live against plain decoding, a random one, the best static setting and transformers.

`make eval RUN=runs/…` makes a run's table again; `make eval DEPTH="6 runs/…" BUDGET="32 runs/…"` runs every mix of
fixed and learned depth and budget.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import agents
from agents.fixed import FixedAgent, settings
from agents.random import RandomAgent
from experiments.arms import Arm, Encoded, decoded, plain_decoder, run_arms, transformers_arm
from experiments.comparison import by_task, checked, divergences, same_text, summary, throughput
from experiments.costs import cost_curves, describe
from experiments.machine import machine
from experiments.report import draw, markdown, settings_played
from spec_envs import ENVIRONMENTS
from spec_envs.controls import Control, Policy, make_control
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.depth import DepthControl
from spec_envs.decoding.checkpoints import load_tokenizer, resolve_device
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.pair import load_decoder, make_clocks
from spec_envs.files import whole, write_json
from spec_envs.prompts import Prompt, encode, load_prompts

# Training prompts that the grid of static settings is tried on, and tokens of each.
STATIC_PROMPTS, STATIC_TOKENS = 5, 48


def decoder_for(env: dict[str, Any], control: Control) -> Decoder:
    """The decoder that an environment with these keyword arguments has."""
    names = ("target", "drafter", "device", "dtype", "temperature", "top_p")
    clock = make_clocks(env.get("clock", "wall"), resolve_device(env.get("device", "auto")))[0]
    chosen = {name: env[name] for name in names if name in env}
    return load_decoder(**chosen, clock=clock, width=control.width, max_depth=control.max_depth)


def encoded_prompts(env: dict[str, Any], split: str, count: int) -> list[Encoded]:
    """``count`` prompts of a split, taken from the tasks in turn."""
    prompts = load_prompts(env.get("prompts", "all"), split, env.get("data_dir"))
    tokenizer = load_tokenizer(env.get("target", "smollm2-135m"))
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.task, []).append(prompt)
    mixed = [p for turn in itertools.zip_longest(*groups.values()) for p in turn if p is not None]
    return [Encoded(p.task, encode(tokenizer, p.text, env.get("template"))) for p in mixed[:count]]


def best_static(env_id: str, env: dict[str, Any], prompts: Sequence[Encoded]) -> dict[str, Any]:
    """The static setting with the highest throughput on training prompts, by exhaustive grid."""
    control = make_control(ENVIRONMENTS[env_id], env)
    decoder = decoder_for(env, control)
    arms = {str(v): decoded(decoder, Policy(control, FixedAgent(control, v))) for v in settings(control)}
    samples = run_arms(arms, prompts, min(STATIC_TOKENS, env.get("max_new_tokens", 128)), "static settings")
    rates = {int(name): throughput(arm) for name, arm in samples.items()}
    return {"name": control.name, "best": max(rates, key=rates.__getitem__), "tokens_per_second": rates}


def run_tables(
    policies: dict[str, Policy],
    env: dict[str, Any],
    decoder: Decoder,
    test_prompts: int,
    references: Sequence[str],
    learned: Sequence[str],
) -> dict[str, Any]:
    """Run plain decoding (twice), transformers and the policies side by side; everything a table needs."""
    prompts = encoded_prompts(env, "test", test_prompts)
    max_new_tokens = env.get("max_new_tokens", 128)
    plain = plain_decoder(decoder)
    arms: dict[str, Arm] = {"plain": decoded(plain, None), "plain again": decoded(plain, None)}
    if not decoder.clock.priced:
        arms["transformers generate"] = transformers_arm(env.get("target", "smollm2-135m"), decoder)
    arms |= {name: decoded(decoder, policy) for name, policy in policies.items()}
    samples = run_arms(arms, prompts, max_new_tokens, "held-out prompts")
    results: dict[str, Any] = {
        "arms": summary(samples, references),
        "references": list(references),
        "prompts": len(samples["plain"]),
        "tasks": list(by_task(samples["plain"])),
        "max_new_tokens": max_new_tokens,
        "temperature": decoder.verifier.temperature,
        "machine": machine(decoder),
        "curves": None if decoder.clock.priced else describe(cost_curves(decoder)),
        "actions": {name: settings_played(policies[name].control, samples[name]) for name in learned},
        "by_task": {
            name: {task: throughput(group) for task, group in by_task(arm).items()} for name, arm in samples.items()
        },
    }
    if decoder.verifier.temperature == 0:
        results["divergences"] = {
            name: divergences(decoder, samples[name]) | {"same_text": same_text(samples[name], samples["plain"])}
            for name in learned
        }
    return results


def evaluate_run(
    run: Path, overrides: dict[str, Any], test_prompts: int, static: dict[str, Any] | None
) -> dict[str, Any]:
    """The table of one run: plain, random, best static setting, trained policy, transformers."""
    config = agents.read_config(run)
    env = {**config["env"], **overrides}
    control, agent = agents.load(run)
    decoder = decoder_for(env, control)
    static = static or best_static(config["id"], env, encoded_prompts(env, "train", STATIC_PROMPTS))
    alone = make_control(ENVIRONMENTS[config["id"]], env)
    name = config["agent"]
    policies = {
        "random": Policy(alone, RandomAgent(alone, seed=0)),
        "static": Policy(alone, FixedAgent(alone, static["best"])),
        name: Policy(control, agent),
    }

    def measure(count: int) -> dict[str, Any]:
        return run_tables(policies, env, decoder, count, ["plain", "static"], [name]) | {"static": static}

    return checked(measure, test_prompts)


def evaluate_mixes(
    depths: Sequence[str], budgets: Sequence[str], given: dict[str, Any], test_prompts: int
) -> dict[str, Any]:
    """Every mix of depths and budgets, each a number or a run folder."""
    trained = [agents.read_config(Path(value))["env"] for value in (*depths, *budgets) if not value.isdigit()]
    for key in ("target", "drafter", "width", "max_depth"):
        if len({str(env.get(key)) for env in trained}) > 1:
            raise ValueError(f"the runs were trained with different {key}; they cannot be mixed")
    env = (trained[0] if trained else {}) | given
    policies, learned = {}, []
    for depth, budget in itertools.product(depths, budgets):
        name = f"depth {depth}, budget {budget}"
        policies[name] = mixed(depth, budget, env)
        if not (depth + budget).isdigit():
            learned.append(name)
    decoder = decoder_for(env, next(iter(policies.values())).control)
    return checked(lambda count: run_tables(policies, env, decoder, count, ["plain"], learned), test_prompts)


def mixed(depth: str, budget: str, env: dict[str, Any]) -> Policy:
    """The policy for one depth and one budget, each a number or a run folder."""
    sizes = {key: env[key] for key in ("width", "max_depth") if key in env}
    if depth.isdigit() and budget.isdigit():
        fixed = DepthControl(budget=int(budget), **sizes)
        return Policy(fixed, FixedAgent(fixed, int(depth)))
    if depth.isdigit():
        sized = learned_policy(budget, BudgetControl)
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run")
    parser.add_argument("--depth", default="", help="depths, each a number or a run folder, separated by spaces")
    parser.add_argument("--budget", default="", help="budgets, each a number or a run folder, separated by spaces")
    parser.add_argument("--data-dir", help="folder of NAME/question.jsonl files (default: the shipped prompts)")
    parser.add_argument("--prompts", help="prompt sets, separated by commas")
    parser.add_argument("--count", type=int, default=15, help="held-out prompts (default 15)")
    parser.add_argument("--dtype", help="auto, bfloat16, float32 (default: the run's)")
    parser.add_argument("--clock", help="wall, or a cost table (default: the run's)")
    parser.add_argument("--temperature", type=float, help="of the target (default: the run's)")
    parser.add_argument("--max-new-tokens", type=int, help="per prompt (default: the run's)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results (default: the run's, its eval/ for other settings than its own, or runs/mixes)",
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
    try:
        if args.depth or args.budget:
            results = evaluate_mixes(args.depth.split() or ["2"], args.budget.split() or ["15"], overrides, args.count)
            save(results, args.out or Path("runs/mixes"))
        elif args.run:
            results = evaluate_run(args.run, overrides, args.count, None)
            save(results, args.out or (args.run / "eval" if overrides else args.run))
        else:
            raise ValueError("nothing to evaluate: give RUN=runs/…, or DEPTH=… and BUDGET=…")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
