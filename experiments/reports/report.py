"""The table and the picture at the end of an experiment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spec_envs.controls import Control
from spec_envs.controls.base import Setting
from spec_envs.experiments.measure.arms import Sample
from spec_envs.experiments.measure.results import AGAIN, Divergence, Exit, Histogram, Results, Row
from spec_envs.experiments.measure.statistics import by_task
from spec_envs.experiments.reports.figures import CROWDED, draw_arms, draw_histogram, draw_shares, drawn

COLLAPSED = 0.95  # share of one setting above which a policy is reported as a static setting


def markdown(results: Results) -> str:
    """Return a table and notes about it, as Markdown."""
    lines = [*arms_tables(results), "", *tasks_table(results), "", *(f"- {note}" for note in notes(results))]
    if results.first_try:
        lines += ["", "The first try, with an A/A interval that excludes 1:", "", markdown(results.first_try)]
    return "\n".join(lines).strip() + "\n"


def arms_tables(results: Results) -> list[str]:
    """Return the lines of the table of all arms and, where they were timed, of the priced table, each with a caption."""
    clock, priced = results.machine.clock, results.at_prices
    if clock not in ("wall", None):
        caption = f"Priced: every forward costs what the cost table {clock} lists for it. Nothing is timed."
        return [caption, "", *arms_table(results.arms, results.references), *switching_table(results)]
    void = "" if results.quiet else f" VOID: an arm that was timed twice differs from itself ({results.twice()})."
    lines = [f"Timed: what this machine gives you now.{void}", "", *arms_table(results.arms, results.references)]
    if priced:
        caption = f"Priced: the same texts at this machine's cost curve ({priced.source}), without the clock's noise."
        rows = {name: priced.arms.get(name) for name in results.arms if not name.endswith(AGAIN)} | priced.arms
        rows = {name: row for name, row in rows.items() if not name.endswith(AGAIN)}
        lines += ["", caption, "", *arms_table(rows, [r for r in results.references if r in priced.arms])]
    return [*lines, *switching_table(results)]


def switching_table(results: Results) -> list[str]:
    """Return the lines of the table of recorded texts whose domains come one after another; none without such texts."""
    if not results.switching:
        return []
    rows = results.switching.arms
    caption = "Priced: the recorded test texts, those of each domain one after another."
    return ["", caption, "", *arms_table(rows, [name for name in results.references if name in rows])]


def arms_table(arms: Mapping[str, Row | None], references: Sequence[str]) -> list[str]:
    """Return the lines of a table of arms; an arm without figures has dashes."""
    head = ["arm", "tokens/s", *(f"over {r} [95 %]" for r in references), "emitted/cycle", "verified/cycle"]
    lines = []
    for name, row in arms.items():
        cells = [name, *["–"] * (len(head) - 1)]
        if row:
            cells = [name, f"{row.tokens_per_second:.1f}", *(f"{row.over[r]:.3f}" for r in references)]
            cells += [f"{row.emitted_per_cycle:.2f}", f"{row.verified_per_cycle:.1f}"]
        lines.append(cells)
    return aligned(head, lines)


def tasks_table(results: Results) -> list[str]:
    """Return the lines of a table: throughput over plain decoding by task."""
    tasks, plain = results.tasks, results.by_task["plain"]
    rows = [
        [name, *(f"{rates[task] / plain[task]:.2f}" for task in tasks)]
        for name, rates in results.by_task.items()
        if name != "plain" and not name.endswith(AGAIN)
    ]
    return aligned(["over plain, by task", *tasks], rows)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table whose columns are as wide as their cells."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [" | ".join(map(str.ljust, cells, widths)) for cells in (head, *rows)]
    return [f"| {lines[0]} |", f"|{'|'.join('-' * (width + 2) for width in widths)}|", *(f"| {x} |" for x in lines[1:])]


def notes(results: Results) -> list[str]:
    """Return the notes below the table."""
    lines = [
        f"{results.prompts} held-out prompts ({', '.join(results.tasks)}), at most {results.max_new_tokens} new "
        f"tokens, temperature {results.temperature}; without prefill; 95 % intervals by paired bootstrap over prompts.",
        f"{results.machine}.",
    ]
    if results.curves:
        lines.append(results.curves + ".")
    if results.static:
        rates = results.static.tokens_per_second
        lines.append(f"Best static setting on training prompts: {max(rates, key=rates.__getitem__)}.")
        if results.static.copied:
            lines.append(f"Best two lengths on training prompts: {lengths_in_words(results.static.copied)}.")
        if results.static.lookup:
            so = ", which is the pair's static" if results.static.looks_up else ""
            lines.append(f"Best length of prompt lookup alone on training prompts: k {results.static.lookup[0]}{so}.")
        lines += order_notes(results, results.static.fixed_order)
    lines.append(results.aa_check())
    if results.link:
        lines.append(
            f"Link {results.link}; simulated delays are computed and added. plain: the cloud alone, streaming its text."
        )
    if results.bytes_per_token:
        sent = ", ".join(f"{name} {up:.0f} and {down:.0f}" for name, (up, down) in results.bytes_per_token.items())
        lines.append(f"Bytes up and down per token: {sent}.")
    if results.exit:
        lines += exit_notes(results.exit)
    lines += text_notes(results.divergences or {})
    for name, share in (results.others_text or {}).items():
        lines.append(
            f"{name}: same tokens as plain on {100 * share:.0f} % of prompts (each software ends texts by its own "
            "rule)."
        )
    for name, histogram in results.actions.items():
        setting, share = most_used(histogram)
        if share >= COLLAPSED:
            lines.append(
                f"{name} chooses {results.decisions[name]} {setting} in {100 * share:.1f} % of its cycles: "
                "it is a static setting."
            )
    return lines


def order_notes(results: Results, order: dict[str, Any] | None) -> list[str]:
    """Return what the best fixed order of drafters is, and whether the recorded texts replay what is decoded live."""
    lines = []
    if order:
        lines.append(
            f"Best fixed order on training prompts: {order['copier']} where {order['match']} or more tokens match, else "
            f"{order['otherwise']}."
        )
    if results.replay_equals_live is not None:
        equal = "equal" if results.replay_equals_live else "DO NOT EQUAL"
        lines.append(f"Random cycles of the recorded texts {equal} those of live decoding.")
    return lines


def text_notes(divergences: dict[str, Divergence]) -> list[str]:
    """Return how close each arm's text is to the target's own text; arms with the same figures share a line."""
    names_by_line: dict[str, list[str]] = {}
    for name, found in divergences.items():
        line = (
            f"{found.per_1000:.1f} of 1,000 emitted tokens are not the argmax of a single forward over their text "
            f"(largest logit gap {found.largest_gap:.2f})"
        )
        if name != "plain":
            line += f"; same tokens as plain on {100 * found.same_text:.0f} % of prompts"
        names_by_line.setdefault(line, []).append(name)
    return [f"{', '.join(names)}: {line}." for line, names in names_by_line.items()]


def exit_notes(found: Exit) -> list[str]:
    """Return what learning changed at an early exit, and what a cycle costs there."""
    cost, moved = found.cost_of_a_cycle, found.drift
    lines = [
        f"Exit after {found.exit_layer} layers, adapter {found.adapter}, {found.k} drafted tokens per cycle: accepted "
        f"share of verified drafts {found.accept_rate_before:.3f} before and {found.accept_rate_after:.3f} after "
        f"learning; emitted per cycle {found.emitted_per_cycle_before:.3f} before and "
        f"{found.emitted_per_cycle_after:.3f} after learning.",
        f"A cycle of the trained exit costs {cost['draft']:.2f} plain steps to draft, {cost['verify']:.2f} to verify, "
        f"and {cost['whole']:.2f} with overhead; it must emit as many tokens to be as fast as plain decoding.",
        f"Verifier on the target's own texts: perplexity {moved.perplexity:.2f}, {moved.drift:.4f} nats per token from "
        f"the target; {moved.drift_argmax_per_1000:.1f} of 1,000 most probable tokens differ.",
    ]
    if found.same_text:
        same = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found.same_text.items())
        lines.append(f"Prompts with the tokens of plain decoding by the same verifier: {same}.")
    return lines


def setting_name(values: Sequence[Setting], axes: Sequence[str]) -> str:
    """Return a static setting in words, such as "depth 2, budget 7". A value that is a name is shown without its
    axis."""
    return ", ".join(
        value if isinstance(value, str) else f"{axis} {value}" for axis, value in zip(axes, values, strict=True)
    )


def lengths_in_words(lengths: Sequence[int]) -> str:
    """Return in words two lengths of chains: without a copy at the beginning, and with one."""
    return f"k {lengths[0]}, and k {lengths[1]} where the first token is a copy"


def most_used(histogram: Histogram) -> tuple[str, float]:
    """Return the setting that is chosen most often over all tasks, and its share of the cycles."""
    counts = sum((Counter(by_setting) for by_setting in histogram.values()), Counter[str]())
    setting, count = counts.most_common(1)[0]
    return setting, count / counts.total()


def settings_played(control: Control, samples: Sequence[Sample]) -> Histogram:
    """Return how often each setting was followed, by task. If there are many settings, only those that were
    followed."""
    counts = {
        task: Counter(str(setting) for sample in group for setting in control.followed(sample.actions, sample.lengths))
        for task, group in by_task(samples).items()
    }
    shown = [str(setting) for setting in control.settings()]
    if len(shown) > CROWDED:
        shown = [name for name in shown if any(name in found for found in counts.values())]
    return {task: {name: found[name] for name in shown} for task, found in counts.items()}


def draw(results: Results, path: Path) -> None:
    """Draw the speed of every arm with its interval, and the choices of the learned arms by task or state of the
    link."""
    histograms = results.by_state or results.actions
    heights = [1 + (0.5 if results.at_prices else 0.35) * len(results.arms), *[2.8] * len(histograms)]
    with drawn(path, 11, sum(heights)) as figure:
        axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        draw_arms(axes[0], results.arms, results.references[0], results.at_prices.arms if results.at_prices else {})
        void = "" if results.quiet else f"; timed on a busy machine ({results.twice()})"
        title = f"{results.prompts} held-out prompts, temperature {results.temperature:g}{void}"
        axes[0].set_title(title, fontsize=10)
        for axis, (name, histogram) in zip(axes[1:], histograms.items(), strict=True):
            if results.by_state:
                draw_shares(axis, histogram)
                axis.set_ylabel(f"choices of {name}")
            else:
                draw_histogram(axis, histogram)
                axis.set_xlabel(f"{results.decisions[name]} chosen by {name}")
