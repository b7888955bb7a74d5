"""The table and the pictures at the end of an experiment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spec_envs.controls import Control
from spec_envs.controls.base import Setting
from spec_envs.experiments.measure.arms import Sample
from spec_envs.experiments.measure.statistics import aa_agrees, by_task
from spec_envs.files import whole

COLLAPSED = 0.95  # share of one setting from which a policy is reported as a static setting
CROWDED = 24  # settings from which their names are written upwards


def markdown(results: dict[str, Any]) -> str:
    """What :func:`spec_envs.experiments.evaluate.run_tables` returns, as a table with what is needed to read it."""
    arms, references = results["arms"], results["references"]
    head = ["arm", "tokens/s", *(f"over {r} [95 %]" for r in references), "emitted/cycle", "verified/cycle"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in arms.items():
        ratios = [row[f"over_{r}"] for r in references]
        cells = [name, f"{row['tokens_per_second']:.1f}"]
        cells += [f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in ratios]
        cells += [f"{row['emitted_per_cycle']:.2f}", f"{row['verified_per_cycle']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *tasks_table(results), "", *(f"- {note}" for note in notes(results))]
    if "first_try" in results:
        lines += ["", "The first try, whose A/A interval excludes 1:", "", markdown(results["first_try"])]
    return "\n".join(lines).strip() + "\n"


def tasks_table(results: dict[str, Any]) -> list[str]:
    """Throughput over plain decoding by task."""
    tasks, rates = results["tasks"], results["by_task"]
    lines = [f"| over plain, by task | {' | '.join(tasks)} |", f"|---{'|---' * len(tasks)}|"]
    for name, by_name in rates.items():
        if name not in ("plain", "plain again"):
            ratios = [f"{by_name[task] / rates['plain'][task]:.2f}" for task in tasks]
            lines.append(f"| {name} | {' | '.join(ratios)} |")
    return lines


def notes(results: dict[str, Any]) -> list[str]:
    """What stands below the table."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    lines = [
        f"{results['prompts']} held-out prompts ({', '.join(results['tasks'])}), at most {results['max_new_tokens']} new "
        f"tokens, temperature {results['temperature']}; prefill apart; 95 % intervals by paired bootstrap over prompts.",
        f"{machine['processor']}, {machine['threads']} threads, {machine['dtype']}, clock {machine['clock']}; {versions}; "
        f"revision {machine['revision']}.",
    ]
    if results["curves"]:
        lines.append(results["curves"] + ".")
    if results.get("static"):
        rates = results["static"]["tokens_per_second"]
        lines.append(f"Best static setting on training prompts: {max(rates, key=rates.get)}.")
    lines.append(f"A/A check (plain twice): the interval {'contains' if aa_agrees(results) else 'EXCLUDES'} 1.")
    if "link" in results:
        lines.append(
            f"Link {results['link']}; simulated delays are computed and added. plain is the cloud alone, streamed."
        )
        sent = ", ".join(f"{name} {up:.0f} and {down:.0f}" for name, (up, down) in results["bytes_per_token"].items())
        lines.append(f"Bytes up and down per token: {sent}.")
    if "exit" in results:
        lines += exit_notes(results["exit"])
    lines += text_notes(results.get("divergences", {}))
    for name, share in results.get("others_text", {}).items():
        lines.append(
            f"{name}: same tokens as plain on {100 * share:.0f} % of prompts (each side ends its texts by its own rule)."
        )
    for name, histogram in results.get("actions", {}).items():
        setting, share = most_played(histogram)
        if share >= COLLAPSED:
            lines.append(
                f"{name} plays {results['decisions'][name]} {setting} in {100 * share:.1f} % of its cycles: "
                "it is a static setting."
            )
    return lines


def text_notes(divergences: dict[str, dict[str, float]]) -> list[str]:
    """Whether what was emitted is the target's own text; arms of which the same is to be said stand together."""
    said: dict[str, list[str]] = {}
    for name, found in divergences.items():
        line = (
            f"{found['per_1000']:.1f} of 1,000 emitted tokens are not the argmax of one forward over their text "
            f"(largest logit gap {found['largest_gap']:.2f})"
        )
        if name != "plain":
            line += f"; same tokens as plain on {100 * found['same_text']:.0f} % of prompts"
        said.setdefault(line, []).append(name)
    return [f"{', '.join(names)}: {line}." for line, names in said.items()]


def exit_notes(found: dict[str, Any]) -> list[str]:
    """What learning changed at an exit, and what a cycle costs there."""
    cost = found["cost_of_a_cycle"]
    accepted, emitted = (
        f"{found[f'{key}_before']:.3f} before and {found[f'{key}_after']:.3f} after learning"
        for key in ("accept_rate", "emitted_per_cycle")
    )
    lines = [
        f"Exit behind {found['exit_layer']} layers, adapter {found['adapter']}, {found['k']} drafted per cycle: "
        f"accepted of judged drafts {accepted}; emitted per cycle {emitted}.",
        f"A cycle of the trained exit costs {cost['draft']:.2f} plain steps to draft and {cost['verify']:.2f} to verify, "
        f"{cost['whole']:.2f} with what is around that: what it must emit to be as fast as plain decoding.",
        f"Verifier on the target's own texts: perplexity {found['perplexity']:.2f}, {found['drift']:.4f} nats per token "
        f"from the target, {found['drift_argmax_per_1000']:.1f} of 1,000 most probable tokens are others.",
    ]
    if "same_text" in found:
        same = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["same_text"].items())
        lines.append(f"Prompts with the tokens of plain decoding by the same verifier: {same}.")
    return lines


def setting_name(values: Sequence[Setting], axes: Sequence[str]) -> str:
    """Return a static setting in words, such as "depth 2, budget 7"; a value that is a name stands for itself."""
    return ", ".join(
        value if isinstance(value, str) else f"{axis} {value}" for axis, value in zip(axes, values, strict=True)
    )


def most_played(histogram: dict[str, dict[str, int]]) -> tuple[str, float]:
    """The setting played most over all tasks, and its share of the cycles."""
    counts = sum((Counter(by_setting) for by_setting in histogram.values()), Counter())
    setting, count = counts.most_common(1)[0]
    return setting, count / counts.total()


def settings_played(control: Control, samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Return how often each setting was followed, by task; of many settings, only those that were."""
    counts = {
        task: Counter(str(setting) for sample in group for setting in control.played(sample.actions, sample.lengths))
        for task, group in by_task(samples).items()
    }
    shown = [str(setting) for setting in control.settings()]
    if len(shown) > CROWDED:
        shown = [name for name in shown if any(name in found for found in counts.values())]
    return {task: {name: found[name] for name in shown} for task, found in counts.items()}


def draw(results: dict[str, Any], path: Path) -> None:
    """Speed of every arm with its interval, and what the learned arms played, by task."""
    histograms = results.get("by_state") or results.get("actions", {})
    heights = [1 + 0.35 * len(results["arms"]), *[2.8] * len(histograms)]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    draw_arms(axes[0], results["arms"], results["references"][0])
    axes[0].set_title(f"{results['prompts']} held-out prompts, temperature {results['temperature']}", fontsize=10)
    for axis, (name, histogram) in zip(axes[1:], histograms.items(), strict=True):
        if "by_state" in results:
            draw_shares(axis, histogram)
            axis.set_ylabel(f"choices of {name}")
        else:
            draw_histogram(axis, histogram)
            axis.set_xlabel(f"{results['decisions'][name]} played by {name}")
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def error_bars(ratios: Sequence[dict[str, float]]) -> list[list[float]]:
    """How far intervals reach below and above their values; a value may lie outside by what rounding makes."""
    return [[max(0.0, r["value"] - r["low"]) for r in ratios], [max(0.0, r["high"] - r["value"]) for r in ratios]]


def draw_arms(axis: Any, arms: dict[str, Any], reference: str) -> None:
    """Horizontal bars of throughput over the reference arm."""
    names = list(arms)[::-1]
    ratios = [arms[name][f"over_{reference}"] for name in names]
    values = [r["value"] for r in ratios]
    errors = error_bars(ratios)
    axis.barh(names, values, xerr=errors, color="tab:blue", alpha=0.75, capsize=3)
    axis.axvline(1.0, color="black", linewidth=0.8)
    for i, value in enumerate(values):
        axis.text(0.02, i, f"{value:.2f}×", va="center", color="white", fontsize=8)
    axis.set_xlabel(f"throughput over {reference}, 95 % interval")


def draw_shares(axis: Any, histogram: dict[str, dict[str, int]]) -> None:
    """Share of each choice in each state of a link, one bar per state from narrow to wide; rare choices together."""
    total = sum((Counter(counts) for counts in histogram.values()), Counter())
    common = [choice for choice, n in total.most_common(9) if n >= 0.01 * total.total()]
    bottom = [0.0] * len(histogram)
    for choice in [*common, None]:
        shares = []
        for counts in histogram.values():
            n = sum(v for c, v in counts.items() if c == choice or (choice is None and c not in common))
            shares.append(n / max(1, sum(counts.values())))
        if any(shares):
            axis.bar(range(len(histogram)), shares, 0.8, bottom, label=choice or "others")
            bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
    few = len(histogram) <= 12
    axis.set_xticks(range(len(histogram)) if few else [], list(histogram) if few else [], fontsize=8)
    axis.set_xlabel("state of the link: rate up, round trip")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_histogram(axis: Any, histogram: dict[str, dict[str, int]]) -> None:
    """Share of cycles per setting, one bar per task."""
    width = 0.8 / len(histogram)
    for i, (task, counts) in enumerate(histogram.items()):
        total = max(1, sum(counts.values()))
        at = [x + (i - (len(histogram) - 1) / 2) * width for x in range(len(counts))]
        axis.bar(at, [n / total for n in counts.values()], width, label=task)
        axis.set_xticks(range(len(counts)), list(counts), rotation=90 if len(counts) > CROWDED else 0)
    axis.set_ylabel("share of cycles")
    axis.legend(fontsize=8)
