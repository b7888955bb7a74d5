"""Pages of results. NAME.json holds all figures of a measurement; NAME.md and NAME.png are made from that file alone."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from spec_envs.agents import AGENTS
from spec_envs.arguments import input_file, output_folder
from spec_envs.experiments.measure.encoding import from_json, to_json
from spec_envs.experiments.measure.machine import Machine
from spec_envs.experiments.measure.results import ALONE, COPIES, LOOKUP, PAIR
from spec_envs.files import read_json, whole, write_json

R = TypeVar("R")
REPOSITORY = "https://github.com/spec-envs/spec-envs"
ARMS = {  # what an arm is, for the pages
    "plain": "[plain decoding](../concepts/speculative-decoding.md): the target decodes alone, one token per forward.",
    "plain again": "plain decoding once more, for the [A/A check](index.md#how-a-number-is-made).",
    "static": "the best static setting of the problem: one value for each of its choices, chosen on training prompts "
    "and used in every cycle.",
    PAIR: "the best static setting of the pair of models, of all depths and budgets or chain lengths, or of prompt lookup "
    "alone where that is faster on training texts, whatever the environment lets its agent decide.",
    LOOKUP: "prompt lookup alone, without the draft model or the head, at its best chain length; where nothing can be copied "
    "a cycle is a plain step.",
    ALONE: "the best length of chains alone, without the alternatives that are verified beside them.",
    COPIES: "the best two chain lengths, one for cycles whose first token is a copy and one for the others, chosen on training texts.",
    "static again": "the best static setting once more, for the A/A check as well.",
    "transformers generate": "`generate` of transformers on the same weights and device "
    "(in bfloat16 if the target is int8 or q4).",
    "transformers assisted": "`generate` of transformers with its assisted generation: with the same draft model, or "
    "with prompt lookup.",
    "llama.cpp": "llama.cpp's server on the same file of weights ([llama-server](../guides/llama-server.md)).",
    "llama.cpp drafting": "llama.cpp's server with its own speculative decoding: with the same draft model, or with "
    "prompt lookup.",
    "best fixed": "the fixed draft length that is fastest on training prompts.",
    "ltd-iterative-all": "[Learning to Draft](../coming-from/learning-to-draft.md): two policies that decide depth and "
    "budget, trained in turn as published, on the texts of all arms.",
    "ltd": "PPO with the observation and the reward of [Learning to Draft](../coming-from/learning-to-draft.md), but half "
    "its steps, smaller budgets, no iteration and no choice of the best checkpoint.",
}
FAMILIES = {  # by the folder of an agent: what it is, and the page that describes it
    "baselines": ("a baseline", "../agents/index.md"),
    "rules": ("a published rule", "../agents/rules.md"),
    "sb3": ("an agent of Stable-Baselines3", "../agents/stable-baselines3.md"),
    "traced": ("an agent that learns from a trace", "../agents/full-information.md"),
    "exits": ("an agent that trains an early exit", "../agents/exits.md"),
    "selector": ("an agent for the network", "../agents/network.md"),
}


@dataclass(frozen=True)
class Made:
    """The command that made figures, with its arguments, and the day (UTC)."""

    command: str
    date: str

    @classmethod
    def now(cls, command: str) -> Made:
        """Return the command that runs now; ``command`` is its name, and its arguments are those of the process."""
        return cls(
            " ".join([f"spec-envs {command}", shlex.join(sys.argv[1:])]).strip(), f"{datetime.now(UTC):%Y-%m-%d}"
        )


@dataclass(frozen=True)
class Page(Generic[R]):
    """The page of a command's results.

    Attributes:
        kind: class of the results.
        command: name of the command, such as ``"bench decoding"``.
        purpose: what was measured and why, in a sentence.
        caption: what the picture shows.
        body: returns the lines between the picture and the block that says how the figures were made.
        machines: returns the machines on which the figures were measured.
        draw: draws the picture into a PNG file.
    """

    kind: type[R]
    command: str
    title: str
    purpose: str
    caption: str
    body: Callable[[R], Iterable[str]]
    machines: Callable[[R], Sequence[Machine]]
    draw: Callable[[R, Path], None]

    def write(self, results: R, path: Path) -> str:
        """Write the results as JSON to ``path``, and the page and the picture beside it; return the page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"made": to_json(Made.now(self.command))} | to_json(results))
        return self.write_again(path)

    def write_again(self, path: Path) -> str:
        """Write the page and the picture of a JSON file beside it, and return the page."""
        text = self.text(path)
        with whole(path.with_suffix(".md")) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self.draw(self.read(path)[1], path.with_suffix(".png"))
        return text

    def read(self, path: Path) -> tuple[Made, R]:
        """Return what a JSON file holds: how the figures were made, and the results.

        Raises:
            ValueError: the file is missing, damaged, or of another command.
        """
        content = read_json(path, remedy := f"measure again with spec-envs {self.command}")
        try:
            return from_json(Made, content["made"]), from_json(self.kind, content)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold the figures of this command ({error}); {remedy}") from None

    def text(self, path: Path) -> str:
        """Return the page of a JSON file."""
        made, results = self.read(path)
        lines = [
            f"<!-- Written by `spec-envs {self.command}` from {path.name}. Do not edit. -->",
            "",
            f"# {self.title}",
            "",
            self.purpose,
            "",
            f"![{self.caption}]({path.stem}.png)",
            "",
            *self.body(results),
            "",
            *provenance(made, self.machines(results), path.name),
        ]
        return "\n".join(lines) + "\n"

    def publish(self, args: argparse.Namespace, measure: Callable[[], R], name: str) -> R:
        """Measure, write NAME.json, NAME.md and NAME.png into ``args.out`` and print the page; with
        ``args.from_json``, write and print the page of that file without measuring. Return the results."""
        path: Path = args.from_json or args.out / f"{name}.json"
        if path.suffix != ".json":
            raise ValueError(f"{path} is not named .json; expected the JSON file beside a page")
        try:
            text = self.write_again(path) if args.from_json else self.write(measure(), path)
        except (LookupError, ArithmeticError, RuntimeError) as error:
            if not args.from_json:
                raise
            raise ValueError(
                f"{path} does not hold all figures of this command ({type(error).__name__}: {error}); "
                f"measure again with spec-envs {self.command}"
            ) from error
        print(text)
        print(f"written: {path}, {path.stem}.md, {path.stem}.png")
        return self.read(path)[1]


def add_page_arguments(
    parser: argparse.ArgumentParser, out: Path | None = Path("runs/bench"), shown: str = "runs/bench"
) -> None:
    """Add ``--out`` and ``--from-json``.

    Args:
        out: default of ``--out``, which the help shows as ``shown``.
    """
    parser.add_argument(
        "--out",
        type=output_folder,
        default=out,
        help=f"folder of the JSON file, the page and the picture (default {shown})",
    )
    parser.add_argument(
        "--from-json",
        type=input_file,
        metavar="FILE",
        help="measure nothing, and write the page and the picture of this JSON file again",
    )


def provenance(made: Made, machines: Sequence[Machine], data: str) -> list[str]:
    """Return the block that says how figures were made; ``data`` is the name of the JSON file."""
    distinct = list(dict.fromkeys(map(row_of, machines)))
    rows = [("command", f"`{made.command}`"), ("date", f"{made.date} (UTC)")]
    rows += [row for found in distinct for row in found]
    return [
        "## How these figures were made",
        "",
        *table(["", ""], rows),
        "",
        "[How a number is made](index.md#how-a-number-is-made) describes the method, and "
        "[Losslessness](../concepts/lossless.md) why speculation does not change the text. "
        f"All figures of this page are in [{data}]({data}); the command writes the page from that file.",
    ]


def row_of(machine: Machine) -> tuple[tuple[str, str], ...]:
    """Return what is said about a machine and its software."""
    revision = machine.revision
    linked = (
        f"[`{revision}`]({REPOSITORY}/commit/{revision})"
        if re.fullmatch("[0-9a-f]{7,40}", revision)
        else f"`{revision}`"
    )
    return (
        ("revision", linked),
        ("processor", f"{machine.processor}, {counted(machine.threads, 'thread')}"),
        ("dtype", machine.dtype),
        *([("clock", machine.clock)] if machine.clock else []),
        ("versions", ", ".join(f"{name} {number}" for name, number in machine.versions.items())),
    )


def counted(count: int, what: str) -> str:
    """Return a count and a noun, which gets an s unless the count is 1."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def definitions(arms: Iterable[str], own: dict[str, str]) -> list[str]:
    """Return a section that says what each arm is.

    Args:
        own: descriptions of arms that only this page has; those that are named as agents need none.
    """
    words = ARMS | own
    return ["## Arms", "", *(f"- `{name}`: {words.get(name) or agent_in_words(name)}" for name in arms)]


def agent_in_words(name: str, stanza: str = "") -> str:
    """Return what an agent is, with a link to the page that describes it.

    Args:
        stanza: name of its stanza, if that is another.
    """
    family, page = FAMILIES[AGENTS[name].__module__.split(".")[2]]
    return f"[`{name}`]({page}), {family}" + (f", with the settings of the stanza `{stanza}`." if stanza else ".")
