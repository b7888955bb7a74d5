"""The page on the architecture names the folders and files that there are."""

from __future__ import annotations

import re
from pathlib import Path

from spec_envs.agents import AGENTS
from tests.support import ROOT

DOCS = ROOT / "docs"
ARCHITECTURE = (DOCS / "development" / "architecture.md").read_text(encoding="utf-8")


def named(tree: str) -> list[Path]:
    """Return the paths of a tree of folders, each within the folder that is indented less."""
    found: list[Path] = []
    above: list[Path] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [(above[depth - 1] if depth else Path()) / line.split()[0]]
        found.append(above[depth])
    return found


NAMED = named(ARCHITECTURE.split("\n## Folders\n")[1].split("```")[1].removeprefix("text\n"))


def test_every_path_of_the_architecture_exists() -> None:
    assert [str(path) for path in NAMED if not (ROOT / path).exists()] == []


def test_every_folder_with_code_is_in_the_architecture() -> None:
    sources = (path for name in ("spec_envs", "agents", "experiments") for path in (ROOT / name).rglob("*.py"))
    assert {str(folder) for path in sources if (folder := path.parent.relative_to(ROOT)) not in NAMED} == set()


def test_every_agent_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "agents").glob("*.md"))
    assert sorted(re.findall(r"^<!-- agent: (\S+) -->$", text, re.MULTILINE)) == sorted(AGENTS)
