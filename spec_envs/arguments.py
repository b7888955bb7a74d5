"""Arguments of the commands: values out of range and places that cannot be written to are refused before any work."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from spec_envs.files import at_home, is_file


class Refused(SystemExit):
    """Ends a command whose arguments are wrong, with status 2 and the reason as its code."""

    code = 2


class Parser(argparse.ArgumentParser):
    """The parser of a command, which its module's docstring describes.

    Options have to be written in full, because an abbreviation may become ambiguous when an option is added. The usage
    names the command as it was called: ``spec-envs`` replaces ``sys.argv[0]`` by its own name and the subcommand's.
    """

    def __init__(
        self,
        description: str | None,
        epilog: str | None = None,
    ):
        super().__init__(
            prog=Path(sys.argv[0]).name,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog=epilog,
        )

    def error(self, message: str) -> NoReturn:
        """Print the reason in one line and end the command."""
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)
        print(line := f"error: {message}; --help describes every option", file=sys.stderr)
        raise Refused(line)


def shown(text: str) -> str:
    """Return a value as an error shows it: as it was given, or in quotes if it is blank or not printable."""
    return text if text.strip() and text.isprintable() else repr(text)


def whole_number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """Return an argument type: a whole number within a range."""
    expected = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"

    def parse(text: str) -> int:
        try:
            value = int(text) if text.isascii() else lowest - 1
        except ValueError:
            value = lowest - 1
        if value < lowest or (highest is not None and value > highest):
            raise argparse.ArgumentTypeError(f"is {shown(text)}; expected {expected}")
        return value

    return parse


def number(lowest: float, highest: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Return an argument type: a finite number within a range, which excludes ``lowest`` itself if ``above``."""
    least = f"above {lowest:g}" if above else f"{lowest:g} or more"
    expected = least if highest == math.inf else f"{least} and at most {highest:g}"

    def parse(text: str) -> float:
        try:
            value = float(text) if text.isascii() else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not lowest <= value <= highest or (above and value == lowest):
            raise argparse.ArgumentTypeError(f"is {shown(text)}; expected {expected}")
        return value

    return parse


POSITIVE = whole_number(1)
PROMPTS = whole_number(2)  # of a table, whose intervals need two prompts
TOKENS = whole_number(2, 2**20)  # of a text, whose first token belongs to the prefill
SEED = whole_number(0, 2**32 - 1)  # the range of NumPy and Stable-Baselines3
TEMPERATURE = number(0, 100)
TOP_P = number(0, 1, above=True)


def add_model_arguments(parser: argparse.ArgumentParser, target: str = "model", drafter: str = "") -> None:
    """Add ``--target``, ``--device`` and ``--dtype``, and ``--drafter`` where it is described.

    Args:
        target, drafter: what they are, for the help.
    """
    from spec_envs.decoding.loading import DEFAULT_TARGET  # takes seconds, and not every command has a model

    parser.add_argument("--target", type=nonempty, default=DEFAULT_TARGET, help=f"{target} (default {DEFAULT_TARGET})")
    if drafter:
        parser.add_argument("--drafter", type=nonempty, default="auto", help=f"{drafter} (default: the target's own)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto (default), int8, q4, bfloat16, float16 or float32")


def nonempty(text: str) -> str:
    """Return a name that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; expected a name, or leave the option out")
    return text


def output_folder(text: str) -> Path:
    """Return the path of a folder for results, which exists or can be made."""
    return _writable(text, at_home(text))


def output_file(text: str) -> Path:
    """Return the path of a file for a result, which replaces a file of that name."""
    path = _writable(text, at_home(text).parent)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; expected the name of a file")
    return path


def input_folder(text: str) -> Path:
    """Return the path of a folder that exists."""
    if not _is_dir(at_home(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder; expected one that is there")
    return at_home(text)


def input_file(text: str) -> Path:
    """Return the path of a file that exists."""
    if not is_file(at_home(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file; expected one that is there")
    return at_home(text)


def _is_dir(path: Path) -> bool:
    """Return whether there is such a folder; False for a name that no file system takes."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _writable(text: str, folder: Path) -> Path:
    """Return ``text`` as a path, with ``~`` replaced, if ``folder`` can be written into, or could be once made."""
    nonempty(text)
    try:
        at_home(text).exists()  # fails where a name is too long, or a folder must not be read
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from None
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is a file; expected a folder, into which is written")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"nothing can be written into {there}; choose another folder")
    return at_home(text)
