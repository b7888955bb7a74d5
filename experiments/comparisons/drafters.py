"""Compare drafters (`spec-envs bench drafters`): each at its best static setting, all side by side on held-out prompts.

The best static setting of every drafter is chosen on training prompts. A head drafts trees and chains, and so does suffix
decoding, so these have an arm for either. Writes drafters.json, drafters.md and drafters.png into --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec_envs.arguments import PROMPTS, TEMPERATURE, TOKENS, Parser, add_model_arguments, input_folder, nonempty
from spec_envs.controls import Control
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.decoding.decoder import over_models
from spec_envs.decoding.drafters.names import LOOKUP, SUFFIX, DrafterName, known_drafters
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.measure.arms import Arm, decoded, run_arms
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts
from spec_envs.experiments.measure.machine import Machine, machine
from spec_envs.experiments.measure.results import AGAIN, Best, Comparison, Row
from spec_envs.experiments.measure.static import best_static, static_policy
from spec_envs.experiments.measure.statistics import (
    by_task,
    same_text,
    summary,
    throughput,
    with_aa_check,
)
from spec_envs.experiments.reports.figures import draw_arms, drawn
from spec_envs.experiments.reports.pages import Page, add_page_arguments, definitions, table
from spec_envs.experiments.reports.report import setting_name
from spec_envs.settings import Keywords

KEYWORDS = ("target", "device", "dtype", "temperature", "max_new_tokens", "prompts", "data_dir")  # of the environment
CHAINS, TREES = " (chains)", " (trees)"  # after the name of a drafter that drafts both


@dataclass(kw_only=True)
class Drafters(Comparison):
    """Drafters, each at its best static setting.

    Attributes:
        first: the arm that every arm is compared with, besides plain decoding.
        static: the best static setting of every drafter's arm.
        chosen: the same in words.
        by_task: tokens per second by arm and task.
        same_text: share of the prompts with the same tokens as plain decoding, by arm; of sampled texts it says nothing.
    """

    arms: dict[str, Row]
    target: str
    first: str
    static: dict[str, Best]
    chosen: dict[str, str]
    prompts: int
    max_new_tokens: int
    temperature: float
    by_task: dict[str, dict[str, float]]
    same_text: dict[str, float]
    machine: Machine
    first_try: Drafters | None = None


def compare_drafters(env: Keywords, drafters: Sequence[str], count: int) -> Drafters:
    """Measure drafters side by side.

    Args:
        env: keyword arguments of all arms (target, dtype, prompts, …).
        drafters: their names; the first one is what the others are compared with.
        count: number of held-out prompts.
    """
    ways = {arm: (name, control) for name in drafters for arm, control in controls_of(name).items()}
    own: dict[str, Keywords] = {arm: {**env, "drafter": name} for arm, (name, _) in ways.items()}
    decoders = {arm: over_models(decoder_for(own[arm], control)) for arm, (_, control) in ways.items()}
    static = {arm: best_static(own[arm], control) for arm, (_, control) in ways.items()}
    policies = {arm: static_policy(control, static[arm].best) for arm, (_, control) in ways.items()}
    first = next(iter(ways))
    plain = decoders[first].plain()
    arms: dict[str, Arm] = {name: decoded(plain, None) for name in ("plain", f"plain{AGAIN}")}
    arms |= {arm: decoded(decoders[arm], policies[arm]) for arm in ways}
    arms[f"{first}{AGAIN}"] = decoded(decoders[first].separate(), policies[first])

    def measure(prompts: int) -> Drafters:
        samples = run_arms(arms, encoded_prompts(env, "test", prompts), env["max_new_tokens"], "held-out prompts")
        return Drafters(
            arms=summary(samples, ["plain", first]),
            target=env["target"],
            first=first,
            static=static,
            chosen={
                arm: setting_name(static[arm].best, list(control.candidates())) for arm, (_, control) in ways.items()
            },
            prompts=len(samples["plain"]),
            max_new_tokens=env["max_new_tokens"],
            temperature=plain.temperature,
            by_task={
                arm: {task: throughput(group) for task, group in by_task(own).items()} for arm, own in samples.items()
            },
            same_text={arm: same_text(samples[arm], samples["plain"]) for arm in ways},
            machine=machine(decoders[first]),
        )

    return with_aa_check(measure, count)


def controls_of(drafter: str) -> dict[str, Control]:
    """Return the controls under which a drafter is measured, by the name of the arm.

    Raises:
        ValueError: there is no such drafter.
    """
    if DrafterName.parse(drafter).chain:
        return {drafter: KControl()}
    return {f"{drafter}{TREES}": DepthControl(), f"{drafter}{CHAINS}": KControl()}


def body(found: Drafters) -> Iterable[str]:
    """Yield the lines of the page below its picture."""
    yield from measured(found)
    if found.first_try:
        yield ""
        yield "The first try, with an A/A interval that excludes 1:"
        yield ""
        yield from measured(found.first_try)
    yield ""
    own = {arm: in_words(arm) for arm in found.static}
    yield from definitions(
        found.arms, own | {f"{found.first}{AGAIN}": "the first drafter's arm once more, for the A/A check as well."}
    )


def measured(found: Drafters) -> Iterable[str]:
    """Yield the tables of one measurement, and the notes below them."""
    void = "" if found.quiet else f" VOID: an arm that was timed twice differs from itself ({found.twice()})."
    yield f"Timed: what this machine gives you now.{void}"
    yield ""
    compared = ["plain", found.first]
    head = ["drafter", "best static setting", "tokens/s", *(f"over {name} [95 %]" for name in compared)]
    rows = []
    for arm, row in found.arms.items():
        ratios = [f"{row.over[name]:.3f}" for name in compared]
        cycle = [f"{row.emitted_per_cycle:.2f}", f"{row.verified_per_cycle:.1f}"]
        shares = [f"{100 * row.parts[part] / row.seconds:.0f} %" for part in ("draft", "verify")]
        rows.append([arm, found.chosen.get(arm, "–"), f"{row.tokens_per_second:.1f}", *ratios, *cycle, *shares])
    yield from table([*head, "emitted/cycle", "verified/cycle", "drafting", "verifying"], rows)
    yield ""
    tasks = list(found.by_task["plain"])
    yield from table(
        ["over plain, by task", *tasks],
        [
            [arm, *(f"{found.by_task[arm][task] / found.by_task['plain'][task]:.2f}" for task in tasks)]
            for arm in found.static
        ],
    )
    yield ""
    yield (
        f"- Target `{found.target}`. {found.prompts} held-out prompts ({', '.join(tasks)}), at most "
        f"{found.max_new_tokens} new tokens, temperature {found.temperature:g}; without prefill; 95 % intervals by paired "
        "bootstrap over prompts."
    )
    yield f"- {found.aa_check()}"
    if not found.temperature:
        same = f"{100 * min(found.same_text.values()):.0f} %"
        yield f"- The text of every drafter has the tokens of plain decoding on at least {same} of the prompts."
    yield "- *drafting* and *verifying* are shares of the seconds."


def in_words(arm: str) -> str:
    """Return what an arm is."""
    name, what = arm.removesuffix(TREES).removesuffix(CHAINS), "trees" if arm.endswith(TREES) else "chains"
    return f"{what} that the drafter `{name}` drafts, at its best static setting."


def draw(found: Drafters, path: Path) -> None:
    """Draw the throughput of every arm over plain decoding."""
    with drawn(path, 10, 1.4 + 0.35 * len(found.arms)) as figure:
        axis = figure.subplots()
        draw_arms(axis, found.arms, "plain")
        void = "" if found.quiet else f"\ntimed on a busy machine ({found.twice()})"
        figure.suptitle(f"{found.prompts} held-out prompts, temperature {found.temperature:g}{void}", fontsize=10)


PAGE = Page(
    kind=Drafters,
    command="bench drafters",
    title="Drafters side by side",
    purpose="Drafters with and without weights decode the same prompts, each at its best static setting, because who drafts "
    "decides how much there is to gain.",
    caption="Throughput of every drafter at its best static setting over plain decoding",
    body=body,
    machines=lambda found: [found.machine],
    draw=draw,
)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--drafters",
        nargs="+",
        type=nonempty,
        metavar="NAME",
        help="drafters, the first of which the others are compared with: names of models.yml, folders, hub ids, 'lookup', "
        "'suffix', or one of these two and a plus sign before a name (default: all that models.yml has for the target, "
        "lookup and suffix)",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--data-dir", type=input_folder, help="folder of NAME/question.jsonl files (default: the shipped prompts)"
    )
    parser.add_argument(
        "--prompts", type=nonempty, default="all", help="prompt sets, separated by commas (default all)"
    )
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy (default 0)")
    parser.add_argument("--count", type=PROMPTS, default=15, help="number of held-out prompts (default 15)")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=96, help="most new tokens per prompt (default 96)")
    add_page_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    env: dict[str, Any] = {name: getattr(args, name) for name in KEYWORDS}
    env["data_dir"] = str(args.data_dir) if args.data_dir else None
    with one_sentence():
        drafters = args.drafters or [*known_drafters(args.target), LOOKUP, SUFFIX]
        PAGE.publish(args, lambda: compare_drafters(env, list(dict.fromkeys(drafters)), args.count), "drafters")


if __name__ == "__main__":
    main()
