"""The page of the benchmark: where adaptive control pays."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from spec_envs.controls.base import Setting
from spec_envs.experiments.benchmark.findings import Benchmark, FewTexts, Findings, Learned, Tuned
from spec_envs.experiments.measure.results import AGAIN, ALONE, COPIES, LOOKUP, PAIR, Results
from spec_envs.experiments.reports.figures import draw_ratios, drawn
from spec_envs.experiments.reports.pages import Page, definitions, table
from spec_envs.experiments.reports.report import lengths_in_words, markdown, setting_name

NOT_ADAPTIVE = ("plain", "plain again", "static", "static again", PAIR, ALONE, COPIES, LOOKUP)
DETECTED = (1.96 + 0.84) / (2 * 1.96)  # least difference that is told with a power of 0.8, of the width of its interval


def body(results: Benchmark) -> Iterable[str]:
    """Yield the lines of the page below its picture."""
    yield from conditions(results)
    yield from headroom(results.problems)
    for env_id, found in results.problems.items():
        yield from ("", f"## {env_id}", "", *of_environment(found))
    yield ""
    yield from definitions(dict.fromkeys(arm for found in results.problems.values() for arm in found.arms), {})


def conditions(results: Benchmark) -> Iterable[str]:
    """Yield the lines that say which texts and which arms the figures are of."""
    if results.fast:
        yield "This is the small version (`--fast`), with too few texts and seeds to tell arms apart."
        yield ""
    yield (
        "Held-out texts are of the split `test`, which is looked at while agents are developed."
        if results.final_uses is None
        else "Held-out texts are of the split `final`, which only published results are measured on; this is use "
        f"{results.final_uses} of it."
    )
    yield ""
    if any(found.settings.ltd_seeds == 0 for found in results.problems.values()):
        yield "Learning to Draft was left out (`--ltd-seeds 0`)."
        yield ""


def headroom(results: dict[str, Findings]) -> list[str]:
    """Return the lines about how much there is to gain, and how much of it is reached."""
    lines = [
        "Throughput on held-out texts, replayed under this machine's costs. S* is the best static setting, chosen on "
        "training texts, of all that the environment lets be decided, with alternatives beside chains where it verifies "
        "them; *without alternatives* is the best length of chains alone, *lookup* that of chains which prompt lookup copies, "
        "without a model. The pair's S* is that of all depths and budgets, or chain lengths, or lookup where that is faster "
        "on training texts; S* by copies are the two best chain lengths, of cycles whose first token the draft model drafts "
        "and of those whose first token is a copy. C* is the clairvoyant optimum, which no policy can reach. Environments that "
        "replay the same trace have one price list: what forwards cost on this machine. *Per task* is the best static "
        "setting of each task. The last column is "
        "below 0 if `hindsight` is slower than S*.",
        "",
    ]
    rows = []
    for env_id, found in results.items():
        beyond = found.references
        ratios = (beyond.static_over_plain, beyond.per_task_over_static, beyond.clairvoyant)
        pair = f"{named(beyond.pair)}: {beyond.pair_over_static:.3f}"
        copied = f"{lengths_in_words(beyond.copied)}: {beyond.copied_over_static:.3f}" if beyond.copied else ""
        lookup = f"{named(beyond.lookup)}: {beyond.lookup_over_static:.3f}" if beyond.lookup else ""
        alone = f"{named(beyond.alone)}: {beyond.alone_over_static:.3f}" if beyond.alone else ""
        cells = [
            f"`{env_id}`",
            named(beyond.static),
            pair,
            alone,
            lookup,
            copied,
            *(f"{ratio:.3f}" for ratio in ratios),
            f"{found.learned['hindsight'].ratio:.3f}",
            f"{100 * found.gap_share:.0f} %",
        ]
        rows.append(cells)
    head = [
        "environment",
        "S*",
        "the pair's S* over S*",
        "without alternatives",
        "lookup",
        "S* by copies over S*",
        "S* over plain",
        "S* per task",
        "C* over S*",
        "`hindsight` over S*",
    ]
    return [*lines, *table([*head, "of the gap S* to C*"], rows), "", *verdicts(results)]


def verdicts(results: dict[str, Findings]) -> list[str]:
    """Return the lines that say for each environment whether adaptive control pays."""
    lines = ["## Where adaptive control pays"]
    for env_id, found in results.items():
        live = found.arms["hindsight"]
        pays = (
            "cannot be judged, because the timings are void"
            if not found.live.quiet
            else "pays"
            if live.low > 1
            else "does not pay"
            if live.high < 1
            else "cannot be told from the best static setting"
        )
        room = found.references.clairvoyant - 1
        verify, draft = found.checks.costs["verify"], found.checks.costs["draft"]
        drafts = draft[max(n for n in draft if n <= 10)] / verify[1]
        adaptive = {name: arm for name, arm in found.arms.items() if name not in NOT_ADAPTIVE}
        fastest = max(adaptive, key=lambda name: adaptive[name].over_static)
        lines.append(
            f"`{env_id}`: live, `hindsight` {pays} ({live.interval:.3f} of S*); the fastest arm was `{fastest}` "
            f"({adaptive[fastest].interval:.3f}). Knowing everything would gain {100 * room:.0f} %. While decoding, a draft step costs {drafts:.2f} of a plain step, "
            f"and verifying 8 rows costs {verify[8] / verify[1]:.2f} (the curves below are of forwards that were timed "
            "alone)."
        )
    return ["\n\n".join(lines)]


def named(setting: Sequence[Setting]) -> str:
    """Return a static setting of chains (one value) or of trees (two values) in words."""
    return setting_name(setting, ("k",) if len(setting) == 1 else ("depth", "budget"))


def of_environment(found: Findings) -> list[str]:
    """Return the lines about one environment."""
    equal, speeds, recording = found.checks.replay_equals_live, found.checks.speeds, found.checks.recording
    seeds, texts = found.settings.seeds, found.settings.texts
    lines = [
        f"Replayed on {texts[2]} held-out texts, over S*: the interquartile mean over {seeds} seeds{fewer(found)} with its "
        "95 % interval, the seconds of training, and the forwards of the target that the same training takes live (for "
        f"`hindsight` and `exact-pg`: that recording {texts[0]} training texts took). The tasks take turns; *task by "
        "task* means all texts of a task one after another, which matters for arms that learn while they serve.",
        "",
        *table(
            [
                "arm",
                "over S*",
                "over the pair's S*",
                "over S* by copies",
                "over the fastest arm",
                "training s",
                "target forwards",
                "settings",
            ],
            [[f"`{name}`", *cells(row)] for name, row in found.replay.items()],
        ),
        *ranking(found),
    ]
    few = ", ".join(f"{f.texts} ({f.forwards}) {f.value:.3f}" for f in found.few_texts)
    tasks = ", ".join(f"{task} {value:.3f}" for task, value in found.tasks.items())
    lines += [
        "",
        f"- `hindsight` by task: {tasks}.",
        f"- After few training texts (forwards of the target): {few}. {cheaper(found.learned['ppo'], found.few_texts)}",
    ]
    for name, other in found.other_costs.items():
        lines.append(
            f"- Under the cost table `{name}`, which its training has not seen: {other.over_static:.3f} of the best "
            f"static setting under that table ({named(other.static)}); clairvoyant {other.clairvoyant:.3f}."
        )
    lines += [
        f"- Replay against live decoding with random actions: {equal.cycles} cycles; {equal.mismatches} have other "
        f"tokens, and {equal.ties} more at near-ties; priced over timed seconds {equal.priced_over_timed:.3f}.",
        f"- {speeds.replay_steps_per_s / 1e6:.2f} million steps per second on one core, "
        f"{speeds.live_steps_per_s:.1f} live ({speeds.replay_over_live:.0f} times as many). Recording a position takes "
        f"{1000 * recording.position_seconds:.0f} ms, a live cycle at full depth "
        f"{1000 * recording.full_cycle_seconds:.0f} ms.",
        "",
        "Live:",
        "",
        markdown(found.live),
        *(line for sentence in disagreements(found.live) for line in (sentence, "")),
        f"At temperature 1, {found.settings.sampled} prompts, over the same static setting: "
        + ", ".join(f"`{name}` {arm.interval:.3f}" for name, arm in found.sampled.items())
        + ". Arms were trained and tuned at temperature 0.",
    ]
    return lines


def disagreements(live: Results) -> list[str]:
    """Return a sentence about each arm whose live and priced intervals do not overlap; none where the timings are void."""
    if not live.quiet or not live.at_prices:
        return []
    pairs = {
        name: (row.over["static"], live.at_prices.arms[name].over["static"])
        for name, row in live.arms.items()
        if not name.endswith(AGAIN)
    }
    return [
        f"The live and the priced interval of `{name}` over S* do not overlap: {timed:.3f} and {priced:.3f}."
        for name, (timed, priced) in pairs.items()
        if timed.high < priced.low or priced.high < timed.low
    ]


def fewer(found: Findings) -> str:
    """Return in words which arms were trained with fewer seeds."""
    counts = {name: len(row.seeds) for name, row in found.learned.items() if len(row.seeds) < found.settings.seeds}
    return f" ({', '.join(f'`{name}`: {count}' for name, count in counts.items())})" if counts else ""


def cells(row: Learned | Tuned) -> list[str]:
    """Return the cells of a replayed arm: ratio, training seconds and forwards."""
    intervals = (row.ratio, row.over_pair, row.over_copied, row.over_fastest)
    ratio, *others = (f"{interval:.3f}" if interval else "" for interval in intervals)
    if isinstance(row, Learned):
        return [ratio, *others, f"{row.train_seconds:.0f}", f"{row.forwards}", ""]
    settings = ", ".join(f"{key} {value}" for key, value in row.settings.items())
    return [f"{ratio}, task by task {row.by_domain:.3f}", *others, "", "", settings]


def ranking(found: Findings) -> list[str]:
    """Return the line that says which arms are slower than the fastest one, as far as the paired intervals tell, and how
    small a difference they can tell."""
    rows = {name: row.over_fastest for name, row in found.replay.items()}
    fastest = max(rows, key=lambda name: rows[name].value)
    others = {name: ratio for name, ratio in rows.items() if name != fastest}
    slower = [f"`{name}`" for name, ratio in others.items() if ratio.high < 1]
    alike = [f"`{name}`" for name, ratio in others.items() if ratio.high >= 1]
    width = statistics.median(ratio.high - ratio.low for ratio in others.values())
    words = [f"`{fastest}` is the fastest arm."]
    if slower:
        words.append(f"Slower, by intervals of paired differences over texts and seeds: {', '.join(slower)}.")
    if alike:
        words.append(f"Not told from it: {', '.join(alike)}.")
    words.append(
        f"On so many texts a difference of {100 * DETECTED * width:.1f} % is told from none with a power of 0.8."
    )
    return ["", " ".join(words)]


def cheaper(ppo: Learned, few_texts: Sequence[FewTexts]) -> str:
    """Return a sentence about how few forwards of the target `hindsight` needs to be as good as PPO."""
    enough = [few for few in few_texts if few.value >= ppo.value]
    if not enough:
        return f"None of these reaches `ppo` ({ppo.value:.3f} with {ppo.forwards})."
    least = enough[0]
    texts = "1 text" if least.texts == 1 else f"{least.texts} texts"
    return (
        f"`hindsight` is as good as `ppo` ({ppo.value:.3f} with {ppo.forwards} forwards) after {texts}, "
        f"with 1/{ppo.forwards / least.forwards:.0f} of its forwards."
    )


def draw(results: Benchmark, path: Path) -> None:
    """Draw the live throughput of every arm over the best static setting, and a line at C*."""
    problems = results.problems
    with drawn(path, 10, 3.2 * len(problems)) as figure:
        axes = figure.subplots(len(problems), 1, squeeze=False)[:, 0]
        for axis, (env_id, found) in zip(axes, problems.items(), strict=True):
            arms = {name: arm.interval for name, arm in found.arms.items() if not name.startswith("plain")}
            draw_ratios(axis, dict(reversed(arms.items())))
            bound = found.references.clairvoyant
            axis.axvline(bound, color="tab:red", linestyle="--", label="clairvoyant (replayed)")
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set_xlim(left=0.6)
            axis.set_title(f"{env_id}: throughput over the best static setting, live, 95 % interval", fontsize=10)
            axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


PAGE = Page(
    kind=Benchmark,
    command="bench adaptive",
    title="Adaptive control",
    purpose="Agents and published rules that decide while a text is decoded are compared with the best static setting, "
    "live and replayed, to show where adaptive control pays and how much of what could be gained it reaches.",
    caption="Live throughput of every arm over the best static setting",
    body=body,
    machines=lambda results: [found.live.machine for found in results.problems.values()],
    draw=draw,
)
