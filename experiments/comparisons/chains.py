"""Compare fixed and adaptive draft lengths (`spec-envs bench chains`): K = 4, 8 and 16, the best fixed K, the
controllers of the zoo and the trained agents, over all prompts and by context (code, prose, math, json).

The best fixed K is chosen on training prompts and the best agent on validation prompts; all arms are then measured side
by side on held-out prompts. Agents that are not trained yet are trained first, with one seed and on this project's own
decoder; controllers have the settings of their stanzas. Writes chains.json, chains.md and chains.png into --out;
another target, or llama.cpp's server, has files of its own, such as chains-llama-server.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spec_envs import agents
from spec_envs.agents import AGENTS
from spec_envs.arguments import POSITIVE, PROMPTS, TEMPERATURE, TOKENS, Parser, output_folder, shown
from spec_envs.controls import Policy, make_control
from spec_envs.controls.k import ENGINES, KControl
from spec_envs.decoding.loading import DEFAULT_TARGET
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import Experiment, load_experiment
from spec_envs.experiments.measure.arms import Sample, decoded, run_arms
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts
from spec_envs.experiments.measure.results import Interval, Results
from spec_envs.experiments.measure.static import best_static, static_chain
from spec_envs.experiments.measure.statistics import ratio, throughput, with_aa_check
from spec_envs.experiments.measure.tables import side_by_side, tables
from spec_envs.experiments.reports.figures import draw_arms, drawn
from spec_envs.experiments.reports.pages import Page, add_page_arguments, agent_in_words, definitions, table
from spec_envs.experiments.reports.report import markdown
from spec_envs.experiments.runs import run_folder
from spec_envs.experiments.train import trained
from spec_envs.settings import Keywords, Settings

ID = "SpecK-v0"
FIXED = (4, 8, 16)
LONGEST = 24  # most tokens that any arm drafts
CONTROLLERS = (
    *("adaptive-k", "adaptive-k-tuned", "hf-schedule-tuned", "gammatune-tuned", "ucb-tuned", "confidence-tuned"),
    *("svip-tuned", "adaedl-tuned", "specdec++-tuned", "ppo", "ppo-live"),
)
ON_SERVER = (
    "adaptive-k",
    "adaptive-k-tuned",
    "hf-schedule",
    "gammatune",
    "ucb",
    "ppo-segment",
)  # they decide by segment
SERVED_TOKENS = 320  # five segments
CONTEXTS = {
    "humaneval": "code",
    "code": "code",
    "gsm8k": "math",
    "math": "math",
    "json": "json",
}  # other tasks are prose
BEST = "best fixed"


@dataclass(kw_only=True)
class Chains(Results):
    """The table, and the figures of its arms by context.

    Attributes:
        by_context: tokens per second by arm and context.
        variation: standard deviation of each arm's tokens per second over contexts, as a share of their mean.
        acceptance: accepted share of the verified tokens in each text, for each arm that drafts.
        agents: the agent of each stanza.
        models: target and drafter, or the profile that is replayed, in words.
    """

    models: str
    by_context: dict[str, dict[str, float]]
    variation: dict[str, float]
    acceptance: dict[str, list[float]]
    agents: dict[str, str]
    best_fixed_over_plain: Interval
    best_agent: str
    best_agent_over_best_fixed: Interval

    @property
    def best_fixed(self) -> str:
        """The best fixed length in words."""
        return f"K = {self.static.best[0]}" if self.static else BEST


def compare_chains(env: Keywords, stanzas: Sequence[str], count: int, root: Path) -> Chains:
    """Measure all arms, chains as they were published: no alternatives are verified beside them.

    Args:
        env: keyword arguments of all arms (target, drafter, dtype, …).
        stanzas: names of stanzas of experiments/SpecK-v0.yml.
        count: number of held-out prompts.
        root: folder of the run folders of trained agents.
    """
    env = env | {"alternatives": 0}
    experiments = {name: experiment_for(name, env) for name in stanzas}
    shared = load_experiment(ID, "fixed").env | env
    own = {name: env[name] for name in ("engine", "alternatives") if name in env}
    models = in_words(shared, KControl(**own))

    def policies() -> dict[str, Policy]:
        """Return every controller in its initial state."""
        return {name: policy_of(name, experiment, root) for name, experiment in experiments.items()}

    policies()  # agents are trained before anything is measured
    decoder = decoder_for(shared, KControl(LONGEST, **own))
    static = best_static(shared, KControl(**own))
    best_k = int(static.best[0])
    candidates = {name: (decoder.separate(), policy) for name, policy in policies().items()}
    try:
        validation = run_arms(
            {name: decoded(*pair) for name, pair in candidates.items()},
            encoded_prompts(shared, "validation", count),
            shared["max_new_tokens"],
            "choosing the best agent",
        )
    finally:
        for used, _ in candidates.values():
            used.close()
    best = max(validation, key=lambda name: throughput(validation[name]))

    def measure(prompts: int) -> Chains:
        arms = {f"K = {k}": static_chain(k) for k in FIXED} | {BEST: static_chain(best_k)} | policies()
        samples = side_by_side(arms, shared, decoder, prompts, others={})
        results = tables(samples, arms, shared, decoder, ["plain", BEST], list(experiments))
        kinds = {name: experiment.agent for name, experiment in experiments.items()}
        return with_contexts(replace(results, static=static), samples, kinds, best, models)

    return with_aa_check(measure, count)


def experiment_for(stanza: str, env: Keywords) -> Experiment:
    """Return a stanza with keyword arguments of the environment that override its own."""
    return load_experiment(ID, stanza, [f"env.{key}={json.dumps(value)}" for key, value in env.items()])


def in_words(env: Keywords, control: KControl) -> str:
    """Return the models that an environment with these keyword arguments has, or the profile that it replays."""
    settings = Settings.shared(env)
    if settings.trace:
        return f"profile `{settings.trace}`, which is replayed"
    drafter = control.default_drafter(settings.target) if settings.drafter == "auto" else settings.drafter
    return f"target `{settings.target}` and the drafter `{drafter}`"


def policy_of(name: str, experiment: Experiment, root: Path) -> Policy:
    """Return the policy of a controller with its stanza's settings, or of an agent, which is trained unless it is
    trained already.

    Raises:
        ValueError: the agent decides in every cycle, which a server does not offer.
    """
    kind = AGENTS[experiment.agent]
    if kind.learns_from == "nothing":
        control = make_control("k", experiment.env)
        return Policy(control, kind(control=control, **experiment.hyperparameters))
    control = make_control("k", experiment.env)
    if control.engine != "torch" and not experiment.env.get("adjustment_interval"):
        raise ValueError(f"{name} is trained to decide every cycle; a server needs a stanza with adjustment_interval")
    folder = run_folder(root, ID, name, 0)
    env = {key: value for key, value in experiment.env.items() if key != "engine"}
    trained(experiment.model_copy(update={"env": env}), ID, name, 0, folder)
    return Policy(*agents.load(folder))


def contexts(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Return the samples by context."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(CONTEXTS.get(sample.prompt.task, "prose"), []).append(sample)
    return groups


def with_contexts(
    results: Results, samples: dict[str, list[Sample]], kinds: dict[str, str], best: str, models: str
) -> Chains:
    """Return results with the figures by context and the ratios of the comparison.

    Args:
        kinds: the agent of each stanza.
        best: name of the best agent.
        models: target and drafter in words.
    """
    rates = {name: {c: throughput(group) for c, group in contexts(arm).items()} for name, arm in samples.items()}
    return Chains(
        **vars(results),
        models=models,
        by_context=rates,
        variation={
            name: statistics.pstdev(found.values()) / statistics.fmean(found.values()) for name, found in rates.items()
        },
        acceptance={
            name: [s.accepted / s.verified for s in arm if s.verified]
            for name, arm in samples.items()
            if sum(s.verified for s in arm)
        },
        agents=kinds,
        best_fixed_over_plain=ratio(samples[BEST], samples["plain"]),
        best_agent=best,
        best_agent_over_best_fixed=ratio(samples[best], samples[BEST]),
    )


def body(results: Chains) -> Iterable[str]:
    """Yield the lines of the page below its picture."""
    yield f"- Arms decode with the {results.models}."
    yield (
        f"- The best fixed length, {results.best_fixed}, has {results.best_fixed_over_plain:.3f} times the throughput "
        "of plain decoding."
    )
    yield (
        f"- The best agent on validation prompts, `{results.best_agent}`, has "
        f"{results.best_agent_over_best_fixed:.3f} times the throughput of the best fixed length."
    )
    yield ""
    yield markdown(results)
    yield "## By context"
    yield ""
    yield (
        "Tokens per second by the kind of text; *variation* is their standard deviation over the contexts as a share "
        "of their mean."
    )
    yield ""
    names = list(next(iter(results.by_context.values())))
    yield from table(
        ["arm", *names, "variation", "acceptance by text: quartiles"],
        [
            [arm, *(f"{rates[name]:.1f}" for name in names), f"{results.variation[arm]:.3f}", quartiles(results, arm)]
            for arm, rates in results.by_context.items()
        ],
    )
    yield ""
    own = {f"K = {k}": f"a chain of {k} tokens in every cycle ([SpecK](../environments/SpecK-v0.md))." for k in FIXED}
    own |= {stanza: agent_in_words(agent, stanza) for stanza, agent in results.agents.items()}
    yield from definitions(results.arms, own)


def quartiles(results: Chains, arm: str) -> str:
    """Return the quartiles over texts of an arm's acceptance, in words."""
    if arm not in results.acceptance:
        return "–"
    return ", ".join(f"{q:.2f}" for q in np.quantile(results.acceptance[arm], (0.25, 0.5, 0.75)))


def draw(results: Chains, path: Path) -> None:
    """Draw the arms' throughput over plain decoding, tokens per second by context, and acceptance over texts."""
    with drawn(path, 11, 4 + 0.8 * len(results.arms)) as figure:
        top, middle, bottom = figure.subplots(3, 1, height_ratios=[2, 1.2, 1.2])
        draw_arms(top, results.arms, "plain")
        names = list(next(iter(results.by_context.values())))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = [x + (i - (len(names) - 1) / 2) * width for x in range(len(results.by_context))]
            middle.bar(at, [rates[name] for rates in results.by_context.values()], width, label=name)
        slanted = {"rotation": 35, "ha": "right", "fontsize": 8}
        middle.set_xticks(range(len(results.by_context)), list(results.by_context), **slanted)
        middle.set_ylabel("tokens/s")
        middle.legend(fontsize=8, ncols=len(names))
        bottom.boxplot(list(results.acceptance.values()))
        bottom.set_xticks(range(1, len(results.acceptance) + 1), list(results.acceptance), **slanted)
        bottom.set_ylabel("accepted / drafted, by text")


PAGE = Page(
    kind=Chains,
    command="bench chains",
    title="Draft lengths",
    purpose="Fixed draft lengths, published rules and trained agents decode the same prompts, to show what choosing the "
    "length of a chain while decoding is worth over the best fixed length.",
    caption="Throughput of every arm over plain decoding, tokens per second by context, and acceptance by text",
    body=body,
    machines=lambda results: [results.machine],
    draw=draw,
)


def file_name(name: str) -> str:
    """Return a part of a file's name.

    Raises:
        ArgumentTypeError: it has other characters than letters, digits, points and dashes.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise argparse.ArgumentTypeError(f"is {shown(name)}; expected letters, digits, points and dashes")
    return name


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--target", help=f"model to decode (default {DEFAULT_TARGET})")
    parser.add_argument(
        "--drafter",
        help="draft model, EAGLE-3 head, 'lookup', or 'lookup+NAME' (default: the target's own of models.yml)",
    )
    parser.add_argument("--dtype", help="auto, int8, q4, bfloat16, float16 or float32 (default auto)")
    parser.add_argument(
        "--temperature", type=TEMPERATURE, help="sampling temperature of the target (default 0, greedy)"
    )
    parser.add_argument(
        "--engine", choices=ENGINES, help="torch (default), or llama-server, whose files are chains-llama-server.*"
    )
    parser.add_argument("--trace", help="synthetic profile to replay instead of models")
    parser.add_argument(
        "--switch-every", type=POSITIVE, help="texts after which the prompt set changes (default: after each)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=TOKENS,
        help=f"most new tokens per prompt (default 96; {SERVED_TOKENS} on llama-server)",
    )
    parser.add_argument("--count", type=PROMPTS, default=24, help="number of held-out prompts (default 24)")
    parser.add_argument("--agents", help=f"stanzas of experiments/SpecK-v0.yml (default {','.join(CONTROLLERS)})")
    parser.add_argument("--root", type=output_folder, help="folder of trained agents (default: runs, or runs/NAME)")
    parser.add_argument("--name", type=file_name, help="write chains-NAME.json, .md and .png (default: chains.*)")
    add_page_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    keys = ("target", "drafter", "dtype", "temperature", "engine", "trace", "switch_every", "max_new_tokens")
    env = {key: value for key in keys if (value := getattr(args, key)) is not None}
    served = args.engine == "llama-server"
    if served:
        env.setdefault("max_new_tokens", SERVED_TOKENS)
    name = args.name or (args.engine if served else "")
    given = args.agents or ",".join(ON_SERVER if served else CONTROLLERS)
    stanzas, root = [stanza.strip() for stanza in given.split(",")], args.root or Path("runs") / (args.name or "")
    with one_sentence("interrupted; agents trained so far are kept"):
        PAGE.publish(
            args, lambda: compare_chains(env, stanzas, args.count, root), f"chains-{name}" if name else "chains"
        )


if __name__ == "__main__":
    main()
