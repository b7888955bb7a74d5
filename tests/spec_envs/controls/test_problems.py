"""No code outside a problem asks for its class, and every problem has settings that can be followed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from spec_envs.controls import CONTROLS, Control
from tests.support import ROOT

SETTLED = sorted(name for name, kind in CONTROLS.items() if kind.settings is not Control.settings)
CONTROLS_FOLDER = ROOT / "spec_envs" / "controls"


def sources() -> Iterator[Path]:
    """Yield the source files of the library outside the folder of the problems."""
    for folder in ("spec_envs", "agents", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            linked = path.relative_to(ROOT / folder).parts[0] in ("agents", "experiments") and folder == "spec_envs"
            if not linked and not path.is_relative_to(CONTROLS_FOLDER):
                yield path


def names(node: ast.expr) -> set[str]:
    """Return all names and attributes in an expression."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} | {
        part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
    }


def test_no_code_outside_controls_asks_for_their_class() -> None:
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


@pytest.mark.parametrize("name", SETTLED)
def test_every_static_setting_can_be_followed(name: str) -> None:
    control = CONTROLS[name]()
    blank = control.observation_space.low * 0
    offered = control.settings()
    assert len(set(offered)) == len(offered) > 1
    assert all(0 <= control.follow(setting, blank) < control.action_space.n for setting in offered)
    with pytest.raises(ValueError):
        control.follow("no such setting", blank)


@pytest.mark.parametrize("name", SETTLED)
def test_search_candidates_are_settings(name: str) -> None:
    control: Control = CONTROLS[name]()
    first = [values[0] for values in control.candidates().values()]
    pinned, setting = control.static(*first)
    assert pinned.name == name and setting in pinned.settings()
