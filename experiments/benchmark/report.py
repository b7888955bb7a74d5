"""RESULTS.md and RESULTS.png of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from spec_envs.controls.base import Setting
from spec_envs.experiments.measure.report import markdown, setting_name
from spec_envs.files import whole

NOT_ADAPTIVE = ("plain", "plain again", "static")


def results_md(results: dict[str, Any], fast: bool) -> str:
    """The report."""
    lines = ["# Results", ""]
    if fast:
        lines += ["Of the small version (`FAST=1 make benchmark`): too few texts and seeds to tell arms apart.", ""]
    lines += [
        "Written by `make benchmark`; every figure is in its benchmark.json.",
        "",
        "![Live throughput of every arm over the best static setting](RESULTS.png)",
        "",
    ]
    lines += [*headroom(results), ""]
    for env_id, found in results.items():
        lines += ["", f"## {env_id}", "", *of_environment(found)]
    return "\n".join(lines) + "\n"


def headroom(results: dict[str, Any]) -> list[str]:
    """What there is to be had, and who has it."""
    lines = [
        "Throughput on held-out texts, replayed under this machine's costs; S* is the best static setting (chosen on "
        "training texts), I* the informed optimum as far as it could be found (the best of cross-fitted learners and tuned rules), C* the clairvoyant one, "
        "which nobody can reach. Each environment is priced under what forwards cost while it was measured. *Per task* has the "
        "best static setting of each task, over S*; the last column is below 0 where `hindsight` is slower than S*.",
        "",
        "| environment | S* | S* over plain | S* per task | I* over S* | C* over S* | `hindsight` over S* | of I* | of the "
        "gap S* to C* |",
        f"|{'---|' * 9}",
    ]
    for env_id, found in results.items():
        hindsight = found["replay"]["hindsight"]
        cells = [
            f"`{env_id}`",
            named(found["static"]),
            *(f"{found[key]:.3f}" for key in ("static_over_plain", "per_task_over_static", "informed", "clairvoyant")),
            interval(hindsight),
            f"{found['of_informed']:.3f}",
            f"{100 * found['gap_share']:.0f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *verdicts(results)]


def verdicts(results: dict[str, Any]) -> list[str]:
    """Where adaptive control pays, in words, from the figures."""
    lines = ["## Where adaptive control pays"]
    for env_id, found in results.items():
        live = found["arms"]["hindsight"]
        pays = (
            "pays"
            if live["low"] > 1
            else "does not pay"
            if live["high"] < 1
            else "cannot be told from the best static setting"
        )
        room, reached = found["clairvoyant"] - 1, found["informed"] - 1
        known = reached / room if room > 0 else 0.0
        verify = {int(n): s for n, s in found["costs"]["verify"].items()}
        draft = {int(n): s for n, s in found["costs"]["draft"].items()}
        drafts = draft[max(n for n in draft if n <= 10)] / verify[1]
        fastest = max(
            (n for n in found["arms"] if n not in NOT_ADAPTIVE), key=lambda n: found["arms"][n]["over_static"]
        )
        lines.append(
            f"`{env_id}`: live, `hindsight` {pays} ({interval(live, 'over_static')} of S*); fastest was `{fastest}` "
            f"({interval(found['arms'][fastest], 'over_static')}). Knowing everything would gain "
            f"{100 * room:.0f} %; of that, {100 * max(0.0, known):.0f} % could be learned from what an agent sees: the rest is "
            f"acceptance that nothing seen predicts. In decoding, a draft step costs {drafts:.2f} of a plain one, verifying 8 "
            f"rows {verify[8] / verify[1]:.2f} (below: forwards timed alone, before the live table)."
        )
    return ["\n\n".join(lines)]


def named(setting: Sequence[Setting]) -> str:
    """Return a static setting of a chain or of a tree in words."""
    return setting_name(setting, ("k",) if len(setting) == 1 else ("depth", "budget"))


def of_environment(found: dict[str, Any]) -> list[str]:
    """Everything about one environment."""
    equal, recording = found["replay_equals_live"], found["recording"]
    seeds, texts = found["settings"]["seeds"], found["settings"]["texts"]
    lines = [
        f"Replayed on {texts[2]} held-out texts, over S*: interquartile mean over {seeds} seeds with its 95 % interval, "
        "training seconds, and forwards of the target that the same training takes live (of `hindsight` and `exact-pg`: that "
        f"recording {texts[0]} training texts took). The texts come from the tasks in turn; *task by task* is a stationary "
        "stream of each, which matters to what learns while it serves.",
        "",
        "| arm | over S* | training s | target forwards |",
        "|---|---|---|---|",
    ]
    for name, row in found["replay"].items():
        trained = "train_seconds" in row
        told = ", ".join(f"{key} {value}" for key, value in row.get("settings", {}).items())
        cells = [
            f"`{name}`",
            interval(row) if trained else f"{row['value']:.3f}, task by task {row['by_domain']:.3f} ({told})",
        ]
        cells += [f"{row['train_seconds']:.0f}", f"{row['forwards']}"] if trained else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    few = ", ".join(f"{f['texts']} ({f['forwards']}) {f['value']:.3f}" for f in found["few_texts"])
    tasks = ", ".join(f"{task} {value:.3f}" for task, value in found["tasks"].items())
    lines += [
        "",
        f"- `hindsight` by task: {tasks}.",
        f"- After few training texts (forwards of the target): {few}. {cheaper(found)}",
    ]
    for name, other in found["other_costs"].items():
        lines.append(
            f"- Under the cost table `{name}`, which it has not seen: {other['over_static']:.3f} of that table's best static "
            f"setting ({named(other['static'])}); clairvoyant {other['clairvoyant']:.3f}."
        )
    lines += [
        f"- Replay against live under random play: {equal['cycles']} cycles, {equal['mismatches']} of them with another accepted "
        f"length, {equal['ties']} at marked ties; priced over timed seconds {equal['priced_over_timed']:.3f}.",
        f"- {found['replay_steps_per_s'] / 1e6:.2f} million steps per second on one core, {found['live_steps_per_s']:.1f} live "
        f"({found['replay_over_live']:.0f} times). Recording a position takes {1000 * recording['position_seconds']:.0f} ms, a "
        f"live cycle at full depth {1000 * recording['full_cycle_seconds']:.0f} ms.",
        "",
        "Live:",
        "",
        markdown(found["live"]),
        f"At temperature 1, {found['settings']['sampled']} prompts, over the same static setting: "
        + ", ".join(f"`{name}` {interval(row, 'over_static')}" for name, row in found["sampled"].items())
        + ". What was learned or tuned, was so at temperature 0.",
    ]
    return lines


def cheaper(found: dict[str, Any]) -> str:
    """With how few forwards of the target `hindsight` is as good as PPO."""
    ppo = found["replay"]["ppo"]
    enough = [f for f in found["few_texts"] if f["value"] >= ppo["value"]]
    if not enough:
        return f"Of these none reaches `ppo` ({ppo['value']:.3f} with {ppo['forwards']})."
    least = enough[0]
    texts = "1 text" if least["texts"] == 1 else f"{least['texts']} texts"
    return (
        f"As good as `ppo` ({ppo['value']:.3f} with {ppo['forwards']} forwards) is `hindsight` after {texts}, "
        f"with 1/{ppo['forwards'] / least['forwards']:.0f} of its forwards."
    )


def interval(row: dict[str, Any], key: str = "value") -> str:
    """A ratio with its interval."""
    return f"{row[key]:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def draw(results: dict[str, Any], path: Path) -> None:
    """Live throughput of every arm over the best static setting, and how far I* and C* are."""
    figure = Figure(figsize=(10, 3.2 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axis, (env_id, found) in zip(axes, results.items(), strict=True):
        arms = {name: row for name, row in found["arms"].items() if not name.startswith("plain")}
        names = list(arms)[::-1]
        values = [arms[name]["over_static"] for name in names]
        errors = [
            [max(0.0, v - arms[n]["low"]) for n, v in zip(names, values, strict=True)],
            [max(0.0, arms[n]["high"] - v) for n, v in zip(names, values, strict=True)],
        ]
        axis.barh(names, values, xerr=errors, color="tab:blue", alpha=0.75, capsize=3)
        for key, colour in (("informed", "tab:green"), ("clairvoyant", "tab:red")):
            axis.axvline(found[key], color=colour, linestyle="--", label=f"{key} (replayed)")
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xlim(left=0.6)
        axis.set_title(f"{env_id}: throughput over the best static setting, live, 95 % interval", fontsize=10)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
