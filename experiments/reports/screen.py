"""Say in words what a table shows, and make the screen at the end of a command: words, tables, and where to look next."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from spec_envs.experiments.measure.results import COPIES, LOOKUP, PAIR, Exit, Interval, Results, Row
from spec_envs.experiments.reports.report import COLLAPSED, arms_tables, lengths_in_words, most_used

WIDTH = 100  # characters of a line of words
SHOWN = 3  # most settings that a sentence names
ARMS = {
    "plain": "the target alone, one token per forward",
    "plain again, static again": "once more, to show the noise of the timing",
    PAIR: "the best of all depths and budgets, or chain lengths, and of lookup alone, whatever the agent may decide",
    LOOKUP: "the best chain length of prompt lookup alone, without the model",
    COPIES: "the best two chain lengths, one for cycles whose first token is a copy and one for the others",
    "transformers generate": "another library, same weights",
    "untrained exit": "chains of the exit before learning",
    "trained exit": "chains of the exit after learning",
    "per state": "the best choice for each state of the link, which it knows",
    "fixed order": "copy where enough tokens match, else ask one model: the best such rule on training prompts",
    "clairvoyant": "the fewest seconds there can be, which no policy reaches",
}


def sentences(results: Results) -> list[str]:
    """Return what was learned and what it is worth, two sentences for each learned policy."""
    found = []
    for name in results.decisions:
        against = {
            "static": "the best static setting",
            PAIR: "the best of the pair",
            LOOKUP: "lookup alone",
            COPIES: "the best two lengths by copies",
            "fixed order": "the best fixed order",
            "random": "random decisions",
        }
        found += [behaviour(name, results), worth(name, "it", against, results)]
    if results.exit:
        against = {"untrained exit": "with the untrained exit"}
        found += [learning(results.exit), worth("trained exit", "decoding with the trained exit", against, results)]
    return found


def behaviour(name: str, results: Results) -> str:
    """Return how a policy decides, in a sentence."""
    if name not in results.actions:
        row = results.arms[name]
        return (
            f"{name} has {row.verified_per_cycle:.1f} drafted tokens verified per cycle, and a cycle emits "
            f"{row.emitted_per_cycle:.2f} tokens."
        )
    histogram, decision = results.actions[name], results.decisions[name]
    setting, share = most_used(histogram)
    if share >= COLLAPSED:
        return f"{name} chooses {decision} {setting} in {100 * share:.0f} % of its cycles: it is a static setting."
    counts = sum((Counter(by_setting) for by_setting in histogram.values()), Counter[str]())
    often = ", ".join(f"{s} in {100 * n / counts.total():.0f} %" for s, n in counts.most_common(SHOWN) if n)
    return f"{name} varies its {decision} from cycle to cycle: it chooses {often} of its cycles."


def learning(found: Exit) -> str:
    """Return what learning changed at an early exit, in a sentence."""
    before, after = f"{found.accept_rate_before:.2f}", f"{found.accept_rate_after:.2f}"
    if before == after:
        return f"Learning left the accepted share of the exit's drafts at {after}."
    verb = "raised" if found.accept_rate_after > found.accept_rate_before else "lowered"
    return f"Learning {verb} the accepted share of the exit's drafts from {before} to {after}."


def worth(name: str, subject: str, against: dict[str, str], results: Results) -> str:
    """Return what an arm is worth, in a sentence: its speed over plain decoding and over other arms. Random decisions are
    mentioned only if the arm is not faster than they are.

    Args:
        subject: stands for the arm in the sentence.
        against: the other arms by name, in words.
    """
    rows, condition = trusted(results)
    ratios = rows[name].over
    plain = "the cloud alone" if results.link else "plain decoding"
    verdicts = [verdict(ratios["plain"], plain)]
    for other, words in against.items():
        if other != name and other in ratios and (other != "random" or ratios[other].low <= 1):
            verdicts.append(verdict(ratios[other], words))
    prompts = f"{results.prompts} held-out prompts" if results.prompts > 1 else "one held-out prompt (no interval)"
    joined = ", and ".join([", ".join(verdicts[:-1]), verdicts[-1]] if len(verdicts) > 1 else verdicts)
    return f"On {prompts}{condition} {subject} {joined}."


def trusted(results: Results) -> tuple[dict[str, Row], str]:
    """Return the rows that a sentence is about: the timed ones, or the priced ones if the timing is void; and the
    condition under which they hold, in words."""
    if results.machine.clock not in ("wall", None):
        return results.arms, f", priced by the cost table {results.machine.clock},"
    if results.quiet:
        return results.arms, ""
    if results.at_prices:
        return results.at_prices.arms, ", at this machine's cost curve (the timing is void, see below),"
    return results.arms, ", timed under conditions that make the figures void (see below),"


def verdict(ratio: Interval, other: str) -> str:
    """Return in words how fast an arm is beside another one, as far as the interval can tell."""
    shown = f"{ratio:.2f}" if ratio.low < ratio.high else f"{ratio.value:.2f}"
    if 1 in ratio:
        return f"cannot be told from {other} ({shown})"
    return f"is {'' if ratio.low > 1 else 'only '}{shown} times as fast as {other}"


def legend(results: Results) -> list[str]:
    """Return what the arms are that are measured beside the learned ones."""
    known = dict(ARMS)
    if results.link:
        known["plain"] = "the cloud alone, which streams its text"
    if results.static:
        rates = results.static.tokens_per_second
        known["static"] = (
            f"{max(rates, key=rates.__getitem__)}, the best of {len(rates)} fixed settings on training prompts"
        )
        if results.static.copied:
            known[COPIES] += f" ({lengths_in_words(results.static.copied)})"
        if results.static.lookup:
            known[LOOKUP] += (length := f" (k {results.static.lookup[0]})")
            if results.static.looks_up:
                known[PAIR] += f", which is lookup{length}"
    shown = {*results.arms, *(results.at_prices.arms if results.at_prices else ())}
    return [f"{names}: {what}" for names, what in known.items() if names.partition(",")[0] in shown]


def screen(results: Results, folder: Path, again: str, run: Path | None) -> str:
    """Return what is shown at the end of a command.

    Args:
        folder: where the picture and all figures were written.
        again: command that makes the table again.
        run: folder of the run; None if the table is not of one run.
    """
    temperature = f"temperature {results.temperature}"
    told = [
        f"{results.prompts} held-out prompts ({', '.join(results.tasks)}), at most {results.max_new_tokens} new tokens, "
        f"{temperature}; the time to read the prompt does not count; in brackets: 95 % intervals.",
        "; ".join(legend(results)) + ".",
        results.aa_check() + to_do(results, again),
        *texts(results),
    ]
    following = [f"picture:   {folder / 'results.png'}", f"details:   {folder / 'results.md'}"]
    if run:
        following.append(f"learning:  tensorboard --logdir {run}")
        if results.divergences or results.machine.clock in ("wall", None):  # a replay writes no text
            following.append(f'use it:    spec-envs generate "Why is the sky blue?" --run {run}')
    lines = ["", *wrapped(" ".join(sentences(results))), "", *arms_tables(results), ""]
    for note in told:
        lines += wrapped(note, "- ")
    return "\n".join([*lines, "", *following]).lstrip("\n")


def to_do(results: Results, again: str) -> str:
    """Return what to do about timings that are void."""
    if results.quiet:
        return ""
    instead = "Read the priced table, or time" if results.at_prices else "Time"
    return f" {instead} again while the machine does nothing else: {again}"


def texts(results: Results) -> list[str]:
    """Return whether the learned policies' text is the target's own, as it has to be."""
    learned = {name: found for name, found in (results.divergences or {}).items() if name != "plain"}
    if not learned:
        return []
    if all(found.per_1000 == 0 for found in learned.values()):
        return ["Whatever is decided, the text stays the target's own, token for token; only the speed changes."]
    worst = max(learned.values(), key=lambda found: found.per_1000)
    return [f"{worst.per_1000:.1f} of 1,000 tokens differ from the target's own choice (near-ties of rounding)."]


def wrapped(text: str, mark: str = "") -> Sequence[str]:
    """Return the lines of a text; commands in it are not broken at their dashes."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=mark,
        subsequent_indent=" " * len(mark),
        break_on_hyphens=False,
        break_long_words=False,
    )
