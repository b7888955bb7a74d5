"""The examples of README.md and of every page of the documentation run.

The blocks of a page run in order, in one folder and, for Python, in one namespace. A block below the line
`<!-- long -->` takes long, or needs the network: it runs where `-m long` asks for it, and is only checked otherwise:
Python is compiled, and the arguments of commands are parsed. Below `<!-- clone -->` are commands for a clone of the
repository, such as `make train`: they are checked and never run.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from spec_envs.cli import COMMANDS
from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(
    r"^(?: *<!-- (?P<mark>long|clone) -->\n+)? *```(?P<language>\w+)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL
)
EXAMPLES = ("python", "sh")
OTHERS = ("text", "yaml", "json", "toml", "bibtex")


@dataclass
class Block:
    """An example of a page, the line at which it begins, and how it is marked ("" if it is not)."""

    language: str
    text: str
    mark: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    content = page.read_text(encoding="utf-8")
    return [
        Block(
            found["language"],
            textwrap.dedent(found["text"]),
            found["mark"] or "",
            content.count("\n", 0, found.start("text")),
        )
        for found in FENCE.finditer(content)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """Run the blocks of a page in a folder; of the long ones, all or none."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language not in EXAMPLES:
            continue
        if block.mark == "clone" or (block.mark == "long" and not long):
            check(block, page)
        elif block.language == "python":
            # so many lines before it that errors name the line of the page
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.text], check=True, timeout=3600 if long else 300)


def check(block: Block, page: Path) -> None:
    """Compile an example in Python, and parse the arguments of an example's commands."""
    if block.language == "python":
        compile(block.text, str(page), "exec")
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):  # variables before the command
            words.pop(0)
        if words[:1] == ["spec-envs"]:
            parsed(words[1:])
        elif words[:1] == ["make"]:
            subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def parsed(words: list[str]) -> None:
    """Parse the arguments of `spec-envs`; the command's own parser refuses what it does not know."""
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words[len(name.split()) :]])
        importlib.import_module(COMMANDS[name].module).arguments()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    """A block without a language, or of another one, would not be run."""
    content = page.read_text(encoding="utf-8")
    fences = re.findall(r"^ *```(.*)$", content, re.MULTILINE)
    opening = [found for found in fences[::2] if not found.startswith("{")]
    assert set(opening) <= {*EXAMPLES, *OTHERS}


@pytest.mark.model
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, tmp_path, monkeypatch, long=False)


@pytest.mark.long
@pytest.mark.model
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.mark == "long" for block in blocks(page))], ids=name_of
)
def test_long_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(page, tmp_path, monkeypatch, long=True)
