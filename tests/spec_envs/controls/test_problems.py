"""Problems stand side by side: none imports another, and nobody outside asks which of them a control is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from spec_envs import ENVIRONMENTS
from spec_envs.controls import CONTROLS, Control
from tests.support import ROOT

CONTROLS_FOLDER = ROOT / "spec_envs" / "controls"
PLACES = [place.partition(":")[0] for place in ENVIRONMENTS.values()]


def sources() -> Iterator[Path]:
    """Yield files of the library outside the folder of the problems."""
    for folder in ("spec_envs", "agents", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            linked = path.relative_to(ROOT / folder).parts[0] in ("agents", "experiments") and folder == "spec_envs"
            if not linked and not path.is_relative_to(CONTROLS_FOLDER):
                yield path


def names(node: ast.expr) -> set[str]:
    """Return names that stand anywhere in an expression."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} | {
        part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
    }


def test_nobody_outside_asks_for_the_class_of_a_control() -> None:
    classes = {kind.__name__ for kind in CONTROLS.values()}
    asked = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sources()
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("isinstance", "issubclass")
        and classes & names(call.args[1])
    ]
    assert not asked


@pytest.mark.parametrize("module", PLACES)
def test_a_problem_imports_no_other(module: str) -> None:
    path = ROOT / Path(*module.split(".")).with_suffix(".py")
    found = {
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }
    assert not found & set(PLACES)


@pytest.mark.parametrize("name", sorted(set(CONTROLS) - {"dvi"}))
def test_every_static_setting_can_be_followed(name: str) -> None:
    control = CONTROLS[name]()
    blank = control.observation_space.low * 0
    offered = control.settings()
    assert len(set(offered)) == len(offered) > 1
    assert all(0 <= control.follow(setting, blank) < control.action_space.n for setting in offered)
    with pytest.raises(ValueError):
        control.follow("no such setting", blank)


@pytest.mark.parametrize("name", sorted(set(CONTROLS) - {"dvi"}))
def test_what_a_search_tries_are_settings(name: str) -> None:
    control: Control = CONTROLS[name]()
    first = [values[0] for values in control.candidates().values()]
    pinned, setting = control.static(*first)
    assert pinned.name == name and setting in pinned.settings()
