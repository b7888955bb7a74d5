"""The layers of the packages: the direction of imports, and the size of folders and files."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from spec_envs import ENVIRONMENTS
from tests.support import ROOT

# Every layer may import itself and those before it.
LAYERS = (
    ("decoding",),
    ("network",),
    ("controls",),
    ("env", "generation"),
    ("vector",),
    ("agents",),
    ("experiments",),
)
PROBLEMS = {place.partition(":")[0] for place in ENVIRONMENTS.values()}
SOURCES = sorted(path for name in ("spec_envs", "agents", "experiments") for path in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    """Return the name by which a module is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in (*(["spec_envs"] * (parts[0] != "spec_envs")), *parts) if part != "__init__")


MODULES = {name_of(path): path for path in SOURCES}


@cache
def imports(path: Path) -> frozenset[tuple[str, bool]]:
    """Return the modules that a file imports, each with True if the import runs when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) not in later) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add((inner if inner in MODULES else str(node.module), id(node) not in later))
    return frozenset(found)


def layer(module: str) -> int | None:
    """Return the index of a module's layer, or None for modules without one, such as ``files``."""
    part = module.split(".")[1] if module.startswith("spec_envs.") else ""
    return next((i for i, row in enumerate(LAYERS) if part in row), None)


def upward() -> Iterator[str]:
    """Yield all imports of a higher layer, including those inside functions and for types only."""
    for name, path in MODULES.items():
        own = layer(name)
        for other, _ in imports(path):
            theirs = layer(other)
            if own is not None and theirs is not None and theirs > own:
                yield f"{name} imports {other}"


def test_no_layer_imports_one_above_it() -> None:
    assert sorted(upward()) == []


def test_no_import_circle() -> None:
    """No chain of imports that run at import time leads back to its start."""
    needs = {
        name: {other for other, at_once in imports(path) if at_once and other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    while free := {name for name, others in needs.items() if not others}:
        needs = {name: others - free for name, others in needs.items() if name not in free}
    assert not needs, sorted(needs)


def test_problems_do_not_import_each_other() -> None:
    for name in PROBLEMS:
        assert not {other for other, _ in imports(MODULES[name])} & (PROBLEMS - {name}), name


def test_packages_have_one_import_name() -> None:
    """``agents`` and ``experiments`` are imported from ``spec_envs``."""
    for path in (*SOURCES, *TESTS):
        assert not {name for name, _ in imports(path) if name.split(".")[0] in ("agents", "experiments")}, path


def test_tests_do_not_import_tests() -> None:
    for path in TESTS:
        assert not [name for name, _ in imports(path) if name.startswith("tests.") and ".test_" in name], path


def test_files_and_folders_are_small() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (*SOURCES, *TESTS)}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 400} == {}
    folders = Counter(path.parent for path in lengths)
    assert {str(folder.relative_to(ROOT)): n for folder, n in folders.items() if n > 16} == {}
