"""The command ``spec-envs``: a table of subcommands, each of which is the ``main`` of a module.

A subcommand's module is imported only when it runs, so that help and errors of this command need neither PyTorch nor
transformers.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple, NoReturn

from spec_envs import ENVIRONMENTS, __version__
from spec_envs.checked import nearest


class Command(NamedTuple):
    """A subcommand: the module whose ``main`` reads its arguments from ``sys.argv``, its operand, and a line of help."""

    module: str
    operand: str
    help: str


SECTIONS = {
    "First steps": {
        "train": Command("spec_envs.experiments.train", "ENV", "train an agent and measure what it gains"),
        "generate": Command("spec_envs.experiments.stream", '"PROMPT"', "stream an answer under a trained policy"),
        "eval": Command("spec_envs.experiments.evaluate", "RUN", "measure a trained policy again"),
        "video": Command("spec_envs.experiments.video", "ENV", "make a GIF of drafting and verification"),
    },
    "Traces, tuning and data": {
        "trace": Command("spec_envs.experiments.traces.record", "ENV", "record a trace that ENV replays exactly"),
        "trace SpecTopK-v0": Command(
            "spec_envs.experiments.traces.record_expected", "", "record an expected-acceptance trace"
        ),
        "tune": Command(
            "spec_envs.experiments.tune",
            "ENV",
            "tune a published rule on training prompts, or a trained agent on recorded texts",
        ),
        "minari": Command("spec_envs.experiments.traces.minari", "TRACE", "write episodes as a Minari data set"),
    },
    "Drafters and early exits": {
        "drafter": Command("spec_envs.experiments.drafters.__main__", "", "train a drafter for a target"),
        "drafter text": Command("spec_envs.experiments.drafters.text.__main__", "", "write the text it learns from"),
        "standalone": Command(
            "spec_envs.experiments.drafters.standalone", "DRAFTER", "write a draft model that transformers loads"
        ),
        "dvi": Command("spec_envs.experiments.dvi", "", "train an early exit, set by flags, and measure it"),
    },
    "Edge and cloud": {
        "cloud": Command("spec_envs.network.cloud.__main__", "", "serve a target that verifies drafts of many edges"),
        "edge": Command("spec_envs.network.edge.__main__", "HOST", "stream an answer that a cloud verifies"),
        "proxy": Command("spec_envs.network.proxy", "", "give a connection the rate and delay of a link"),
        "links": Command("spec_envs.experiments.network.link_profiles", "", "write the logs of the shipped links"),
    },
    "Measurements": {
        "results": Command(
            "spec_envs.experiments.benchmark.results", "", "write the published results of adaptive control"
        ),
        "bench adaptive": Command("spec_envs.experiments.benchmark.__main__", "", "where adaptive control pays"),
        "bench decoding": Command(
            "spec_envs.experiments.comparisons.decoding", "", "speed beside transformers and llama.cpp"
        ),
        "bench chains": Command("spec_envs.experiments.comparisons.chains", "", "fixed and adaptive draft lengths"),
        "bench drafters": Command("spec_envs.experiments.comparisons.drafters", "", "drafters side by side"),
        "bench exits": Command("spec_envs.experiments.comparisons.exits", "", "agents that train an early exit"),
        "bench edge-cloud": Command(
            "spec_envs.experiments.network.edge_cloud", "", "edge and cloud against the cloud alone"
        ),
        "bench cloud-load": Command("spec_envs.experiments.network.cloud_load", "", "a cloud that serves many edges"),
    },
    "Checks of the package itself": {
        "check zoo": Command("spec_envs.experiments.checks.zoo", "", "train every stanza in small, run every agent"),
        "check chaos": Command("spec_envs.experiments.checks.chaos", "", "kill commands, and continue them"),
    },
}
COMMANDS = {name: command for section in SECTIONS.values() for name, command in section.items()}
GROUPS = sorted({name.split()[0] for name in COMMANDS} - set(COMMANDS))  # words that need a second one
HELP = ("-h", "--help")


def main() -> None:
    """Run the subcommand that the command line names, or print help or the version.

    Raises:
        SystemExit: there is no such subcommand (status 2), or it ended with a status of its own.
    """
    with printed():
        call(sys.argv[1:])


@contextmanager
def printed() -> Iterator[None]:
    """End with the status of shells, 141, where nobody reads what is printed any more (``spec-envs … | head``), and in
    one sentence where it cannot be written. Characters that a terminal does not have become question marks."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # neither closed nor replaced
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None where it was closed before
                sys.stdout.flush()
    except OSError as error:
        unread = is_unread()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest of it at its end
        sys.exit(141 if unread else f"error: {error}")


def is_unread() -> bool:
    """Return whether the other end of the pipe into which this process prints is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def call(words: list[str]) -> None:
    """Run the subcommand that the words of the command line name, or print help or the version."""
    first, pair = "".join(words[:1]), " ".join(words[:2])
    named = [words[:count] for count in (2, 1) if words[:count] in map(str.split, COMMANDS)]
    if named:
        run(" ".join(named[0]), words[len(named[0]) :])
    elif first in ("", *HELP):
        print(overview())
    elif first == "--version":
        print(f"spec-envs {__version__}")
    elif first in GROUPS and words[1:2] in ([], *([option] for option in HELP)):
        print(subjects(first))
    else:
        unknown(pair if first in GROUPS else first)


def run(name: str, arguments: list[str]) -> None:
    """Call the ``main`` of a subcommand. Ctrl-C while its module is imported ends in one line and status 130."""
    sys.argv = [f"spec-envs {name}", *arguments]
    try:
        import_module(COMMANDS[name].module).main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def overview() -> str:
    """Return the help of the whole command: its subcommands by section, and two examples."""
    listed = "\n\n".join(f"{title}:\n{rows(list(section))}" for title, section in SECTIONS.items())
    return (
        "usage: spec-envs COMMAND …\n\n"
        "Train, run and measure agents that control speculative decoding of language models.\n\n"
        f"{listed}\n\n"
        f"ENV is one of {', '.join(ENVIRONMENTS)}.\n\n"
        "Examples:\n"
        "  spec-envs train SpecDepth-v0\n"
        '  spec-envs generate "Why is the sky blue?" --run runs/SpecDepth-v0/ppo-0\n\n'
        "spec-envs COMMAND --help describes a command and its options; spec-envs --version prints the version."
    )


def subjects(group: str) -> str:
    """Return the help of a group: the subcommands that begin with its word."""
    names = [name for name in COMMANDS if name.split()[0] == group]
    return (
        f"usage: spec-envs {group} SUBJECT …\n\n{rows(names)}\n\n"
        f"spec-envs {group} SUBJECT --help describes a subject and its options."
    )


def rows(names: list[str]) -> str:
    """Return one line of help for each subcommand."""
    return "\n".join(f"  {f'{name} {COMMANDS[name].operand}':<20}{COMMANDS[name].help}" for name in names)


def unknown(name: str) -> NoReturn:
    """End with one sentence that names the most similar subcommand."""
    print(
        f"error: there is no command {name!r}{nearest(name, [*COMMANDS, *GROUPS])}; spec-envs --help lists them",
        file=sys.stderr,
    )
    sys.exit(2)
